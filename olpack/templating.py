"""Jinja that others wrote: rendered in a sandbox, with bounds on time, memory and output.

A template comes from the working folder or from a model's folder, so it may be anybody's. The sandbox gives it no attribute that leads to
Python's internals; the bounds end loops and texts without end.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from olpack.errors import OlpackError

if TYPE_CHECKING:
    from jinja2 import Template

SECONDS = 10.0  # of one template; the slowest that ships takes a hundredth of one
MEMORY = 1 << 30  # bytes beyond what the process has
OUTPUT = 50_000_000  # characters


class Exceeded(Exception):
    """A bound was reached: the message names it."""


@contextmanager
def bounded(seconds: float = SECONDS, memory: int | None = MEMORY) -> Iterator[None]:
    """Raise `Exceeded` where the block takes longer, and MemoryError where it allocates more.

    Both bounds need POSIX. The one on time is the main thread's: elsewhere the block runs without it.

    Args:
        seconds: wall time.
        memory: bytes of address space beyond those that the process has; Linux only. None: any number.
    """
    with address_space(memory), _alarm(seconds):
        yield


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Exceeded(f"it takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def address_space(memory: int | None) -> Iterator[None]:
    """Within the block this process, with its native code, allocates at most this many bytes more, on Linux. None: any number."""
    status = Path("/proc/self/statm")
    if memory is None or not status.is_file():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(status.read_text().split()[0]) * resource.getpagesize() + memory
    if soft != resource.RLIM_INFINITY and soft <= limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def compiled(source: str, file: str, what: str, *, filters: Mapping[str, Callable] = {}, autoescape: bool = False) -> Template:
    """A template of `templates/`, compiled in the sandbox. The arguments and errors are those of `render`."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=not autoescape, undefined=jinja2.StrictUndefined, autoescape=autoescape
    )
    environment.filters |= filters
    with _failures(file, what):
        return environment.from_string(source)  # which computes what is constant


def render(source: str, file: str, what: str, *, filters: Mapping[str, Callable] = {}, autoescape: bool = False, **values: Any) -> str:
    """Render a template of `templates/`.

    Args:
        source: its text.
        file: its name, and `what` it is of, for the errors.
        filters: by their names in the template.
        autoescape: whether values are escaped for HTML.
        values: the template's variables.

    Raises:
        OlpackError: the template does not compile, uses a name that does not exist, does something that the sandbox forbids, or exceeds a bound.
    """
    template = compiled(source, file, what, filters=filters, autoescape=autoescape)
    pieces, length = [], 0
    with _failures(file, what):
        for piece in template.generate(values):
            pieces.append(piece)
            length += len(piece)
            if length > OUTPUT:
                raise Exceeded(f"it writes more than {OUTPUT:,} characters")
    return "".join(pieces)


@contextmanager
def _failures(file: str, what: str) -> Iterator[None]:
    """Bound the block, and explain in a sentence why a template fails in it."""
    import jinja2

    remedy = f"Fix it, or remove your templates/{file} to use the one that comes with olpack."
    try:
        with bounded():
            yield
    except jinja2.TemplateSyntaxError as error:
        raise OlpackError(f"{what} has an error in line {error.lineno}: {str(error.message).rstrip('.')}.", remedy) from None
    except (jinja2.TemplateError, Exceeded, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise OlpackError(f"{what} fails: {str(error).rstrip('.')}.", remedy) from None
    except MemoryError:
        raise OlpackError(f"{what} fails: it takes more than {MEMORY >> 20} MiB of memory.", remedy) from None
