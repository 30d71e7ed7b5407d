"""Worker processes: how one starts, and why one ended.

What may crash or takes a GPU's or a library's memory for good (llama.cpp, its converter, several processes of training) runs in a Python
process of its own. Its job comes on stdin or as a file, its answer goes to stdout, and what libraries print goes to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import olpack
from olpack.errors import OlpackError

KILLED = -9  # exit code after SIGKILL, which the system sends when memory runs out
_WINDOWS_EXCEPTION = 0xC0000000  # exit codes from here on are exceptions such as an access violation
_ABORTS = ("GGML_ASSERT", "GGML_ABORT")


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of olpack: `python -P -m MODULE ARGUMENTS`.

    -P keeps the current folder, which may contain modules of any name, off the path.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def environment(*, offline: bool = True) -> dict[str, str]:
    """The variables of a worker's process.

    Args:
        offline: whether the Hugging Face libraries are kept from the network.
    """
    packages = os.pathsep.join(filter(None, [str(Path(olpack.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": packages,
        "PYTHONSAFEPATH": "1",  # as -P does, for the processes that a worker or a launcher starts
        "GGML_NO_BACKTRACE": "1",  # an abort prints its reason in one line; a debugger would add seconds and pages
        **({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} if offline else {}),
    }


def exit_error(process: str, code: int, log: str, remedy: str, *, crash_remedy: str | None = None, memory_remedy: str | None = None) -> OlpackError:
    """The error that explains why a worker ended without an answer.

    Args:
        process: the subject of the sentence: "The export worker".
        code: its exit code as `subprocess` reports it: negative for a signal.
        log: what it printed to stderr.
        remedy: what to do.
        crash_remedy: what to do after a crash (SIGSEGV, SIGABRT, …); by default `remedy`.
        memory_remedy: what to do where memory ran out; by default `remedy`.
    """
    if code == KILLED:
        return OlpackError(f"{process} was killed by signal 9, most likely because memory ran out.", memory_remedy or remedy)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    reason = next((line for line in lines if any(mark in line for mark in _ABORTS)), lines[-1] if lines else "it printed no reason")
    if 0 <= code < _WINDOWS_EXCEPTION:
        return OlpackError(f"{process} ended with exit code {code}: {reason}", remedy)
    names = {-number: number.name for number in signal.Signals}
    return OlpackError(f"{process} crashed ({names.get(code, hex(code))}): {reason}", crash_remedy or remedy)
