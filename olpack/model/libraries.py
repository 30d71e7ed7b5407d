"""Imports transformers and peft without packages that they would import and olpack never calls."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Nothing in this process or its workers is compiled by torch, but bitsandbytes wraps functions for it, and the compiler that is imported then
# takes 2 of 10 s of imports.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

_hides: bool | None = None  # whether the packages of _UNUSED are hidden; None before the first block
_UNUSED = ("scipy", "sklearn", "torchvision")  # for losses of object detection, for speculative decoding and for images


def import_libraries() -> None:
    """Import transformers' models and peft."""
    with fewer_packages():
        import peft  # noqa: F401
        import transformers.modeling_utils  # noqa: F401


@contextmanager
def fewer_packages() -> Iterator[None]:
    """Within the block, imports find packages missing that transformers takes seconds to import. It asks once for what there is: where its first
    import was in no such block, as that of another program, all are found.

    Nor is garbage collected within: a million objects are made that all stay, and to look through them took a fifth of the imports' time."""
    global _hides
    if _hides is None:
        _hides = "transformers" not in sys.modules
    hidden = [name for name in _UNUSED if _hides and name not in sys.modules]
    collects = gc.isenabled()
    gc.disable()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None is documented: the import of such a module fails
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if collects:
            gc.enable()
