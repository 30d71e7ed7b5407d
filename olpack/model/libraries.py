"""Imports transformers and peft without half of what they import: torch's compiler and distributed tensors, which one device never needs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Nothing in this process or its workers is compiled by torch, but bitsandbytes wraps functions for it, and the compiler that is imported then
# takes 2 of 10 s of imports.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

_COMPILER = "torch._dynamo"
_WRAPPER = "torch._dynamo._trace_wrapped_higher_order_op"  # of which transformers imports one class for masks that it makes
_hides: bool | None = None  # whether the packages of _UNUSED are hidden; None before the first block
_UNUSED = ("scipy", "sklearn", "torchvision")  # for losses of object detection, for speculative decoding and for images


def import_libraries(*, distributed: bool = False) -> None:
    """Import transformers' models and peft.

    Args:
        distributed: whether this process is one of several that train together, with torch's distributed tensors.
    """
    with nothing_unused(distributed=distributed):
        import peft  # noqa: F401
        import transformers.modeling_utils  # noqa: F401


@contextmanager
def nothing_unused(*, distributed: bool = False) -> Iterator[None]:
    """Within the block, imports of transformers' models leave out what olpack never calls; `distributed` as for `import_libraries`. Imports torch."""
    with fewer_packages():
        if distributed:
            yield
            return
        with _alone(), _uncompiled():
            yield


@contextmanager
def fewer_packages() -> Iterator[None]:
    """Within the block, imports find packages missing that transformers takes seconds to import. It asks once for what there is: where its first
    import was in no such block, as that of another program, all are found."""
    global _hides
    if _hides is None:
        _hides = "transformers" not in sys.modules
    hidden = [name for name in _UNUSED if _hides and name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None is documented: the import of such a module fails
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def _alone() -> Iterator[None]:
    """transformers, peft and accelerate ask while they are imported whether torch can be distributed, and import its tensors if it can."""
    import torch.distributed

    before = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = before


@contextmanager
def _uncompiled() -> Iterator[None]:
    """bitsandbytes and transformers have functions compiled while they are imported. Where the compiler is switched off (TORCHDYNAMO_DISABLE) that
    returns the function, and imports the compiler all the same."""
    import torch

    if os.environ.get("TORCHDYNAMO_DISABLE") != "1":
        yield
        return
    _leave_out_compiler()
    before = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment] # of its arguments, they pass the function alone, or others by name
    try:
        yield
    finally:
        torch.compile = before


def _as_it_is(function: Callable | None = None, *_: object, **__: object) -> Callable:
    """A decorator, or a function that returns one, which returns what it is given."""
    return function if function is not None else lambda one: one


def _leave_out_compiler() -> None:
    """Put a module in the place of torch's compiler: a decorator that excludes a function from being compiled returns it. What needs more of the
    compiler has it imported."""
    if _COMPILER not in sys.modules:
        sys.modules[_COMPILER], sys.modules[_WRAPPER] = _Compiler(_COMPILER), _Wrapper(_WRAPPER)
        sys.meta_path.insert(0, _Parts())


class _Compiler(ModuleType):
    __path__: MutableSequence[str] = []  # noqa: RUF012 — as of any package; `_Parts` finds its modules

    disable = allow_in_graph = assume_constant_result = staticmethod(_as_it_is)
    graph_break = staticmethod(lambda *_: None)  # optimizers call it before each step

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_compiler(), name)


class _Wrapper(ModuleType):
    @staticmethod
    def TransformGetItemToIndex() -> object:
        _compiler()
        return importlib.import_module(_WRAPPER).TransformGetItemToIndex()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _compiler()
        return getattr(importlib.import_module(_WRAPPER), name)


class _Parts(MetaPathFinder):
    """Finds a module of the compiler, where one is imported: the whole compiler is imported before."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{_COMPILER}.") or not isinstance(sys.modules.get(_COMPILER), _Compiler):
            return None
        found = _compiler()
        if name in sys.modules:
            return ModuleSpec(name, _Loaded(sys.modules[name]))
        return PathFinder.find_spec(name, found.__path__)


class _Loaded(Loader):
    """The loader of a module that is imported already."""

    def __init__(self, module: ModuleType):
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _compiler() -> ModuleType:
    """torch's compiler itself."""
    if isinstance(sys.modules.get(_COMPILER), _Compiler):
        del sys.modules[_COMPILER]
        if isinstance(sys.modules.get(_WRAPPER), _Wrapper):
            del sys.modules[_WRAPPER]
    return importlib.import_module(_COMPILER)
