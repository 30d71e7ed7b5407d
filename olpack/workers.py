"""Worker processes: how one starts, and why one ended.

What may crash or takes a GPU's or a library's memory for good (llama.cpp, its converter, several processes of training) runs in a Python
process of its own. Its job comes on stdin or as a file, its answer goes to stdout, and what libraries print goes to stderr.

A worker dies with the process that started it. `python -m olpack.workers` is what runs first in each: it has the kernel kill the process when
its parent dies, and then runs the worker's module, or the program of a launcher.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import olpack
from olpack.errors import OlpackError
from olpack.printable import redact_libraries

KILLED = -9  # exit code after SIGKILL, which the system sends when memory runs out, and which anybody may send
_WINDOWS_EXCEPTION = 0xC0000000  # exit codes from here on are exceptions such as an access violation
_ABORTS = ("GGML_ASSERT", "GGML_ABORT")
_PROGRAM = "--program"
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_kills_before: int | None = None  # how many processes the kernel had killed for lack of memory when the last worker started


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of olpack in a worker.

    The worker dies with this process; on Linux, with the thread that starts it. -P keeps the current folder, which may contain modules of any
    name, off the path.
    """
    return _bound_to_this_process(module, *arguments)


def program(*command: str) -> list[str]:
    """The command that runs another program, such as a launcher, so that it dies with this process as a worker does."""
    return _bound_to_this_process(_PROGRAM, *command)


def _bound_to_this_process(*words: str) -> list[str]:
    global _kills_before
    _kills_before = _kills_for_memory()
    return [sys.executable, "-P", "-m", "olpack.workers", str(os.getpid()), *words]


def die_with(parent: int) -> None:
    """Have this process killed when its parent dies, also while it computes.

    Args:
        parent: the process id of the parent, which may have died already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it died before this process asked
            os._exit(1)
        return
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: int) -> None:
    import psutil

    with suppress(psutil.NoSuchProcess):  # it is gone already
        psutil.Process(parent).wait()
    os._exit(1)


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
        kills = _kills_for_memory()
        if kills is None or _kills_before is None:
            return OlpackError(f"{process} was killed by signal 9. The system does not report whether memory ran out.", memory_remedy or remedy)
        if kills > _kills_before:
            return OlpackError(f"{process} was killed by the system, because memory ran out.", memory_remedy or remedy)
        return OlpackError(f"{process} was killed by signal 9, and not because memory ran out.", "Run the same command again.")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    reason = next((line for line in lines if any(mark in line for mark in _ABORTS)), lines[-1] if lines else "it printed no reason")
    if 0 <= code < _WINDOWS_EXCEPTION:
        return OlpackError(f"{process} ended with exit code {code}: {reason}", remedy)
    names = {-number: number.name for number in signal.Signals}
    return OlpackError(f"{process} crashed ({names.get(code, hex(code))}): {reason}", crash_remedy or remedy)


def _kills_for_memory() -> int | None:
    """How many processes the kernel has killed for lack of memory: in this cgroup, else on this machine. None where it does not count them."""
    try:
        # "0::/a/b" of version 2
        places = [line.strip().partition("::")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    except OSError:
        places = []
    for path in (*(Path(f"/sys/fs/cgroup{place}/memory.events") for place in places), Path("/proc/vmstat")):
        try:
            counts = dict(line.split() for line in path.read_text().splitlines())
            return int(counts["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return None


def _main(parent: str, *words: str) -> None:
    """`python -P -m olpack.workers PARENT MODULE ARGUMENTS`, or `… PARENT --program COMMAND`."""
    die_with(int(parent))
    if words[0] == _PROGRAM:
        os.execvp(words[1], words[1:])  # the signal of the parent's death stays set
    redact_libraries()
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
