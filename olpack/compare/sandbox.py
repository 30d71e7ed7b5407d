"""The sandbox in which the Python of a model's answers runs, and what of it this machine offers.

`answer_runner` is the process; this module starts it, waits for it and kills it. docs/security.md lists what it stops and what it does not.
"""

from __future__ import annotations

import marshal
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from olpack.compare import answer_runner
from olpack.errors import OlpackError

CPU_S = 5
WALL_S = 10
MEMORY_BYTES = 1 << 30
_PROBE_S = 30

# Imported and not run as a script, so that its compiled form is used.
_START = "import sys; sys.path.insert(0, sys.argv[1]); import answer_runner; del sys.path[0], sys.argv[1:]; answer_runner.main()"

# What each of the runner's protections stops, for `olpack doctor` and `olpack plan`; the limits alone are there everywhere.
LIMITS = f"{WALL_S} s, {MEMORY_BYTES >> 30} GiB of memory, files of {answer_runner.FILE_BYTES >> 20} MiB"
STOPS = {
    "seccomp": "no network, no further processes, no signals to other processes",
    "landlock": "no file of yours is read or written",
    "namespaces": f"processes, users, mounts and network of its own, and {answer_runner.FOLDER_BYTES >> 20} MiB of disk in memory",
}
MISSING = {
    "seccomp": "the network, further processes and signals are open to them (Linux has seccomp on x86_64 and aarch64)",
    "landlock": "they can read and write your files (Linux 5.13 and later have Landlock)",
    "namespaces": "they can fill the disk while they run (this system gives no user namespaces)",
}


@cache
def protections() -> tuple[str, ...]:
    """What this machine offers of `answer_runner.PROTECTIONS`; each was tried."""
    if sys.platform != "linux":
        return ()
    with tempfile.TemporaryDirectory(prefix="olpack-", ignore_cleanup_errors=True) as folder:
        process = _start(folder)
        try:
            printed, _ = process.communicate(marshal.dumps({"folder": folder}), timeout=_PROBE_S)
        except subprocess.TimeoutExpired:
            return ()
        finally:
            _kill(process)
    return tuple(name for name in answer_runner.PROTECTIONS if name in printed.decode().split())


def described(offered: Sequence[str]) -> tuple[str, str]:
    """(what the sandbox stops on this machine, what it does not stop or "")."""
    stopped = [STOPS[name] for name in STOPS if name in offered]
    return "; ".join([LIMITS, *stopped]), "; ".join(MISSING[name] for name in MISSING if name not in offered)


def asserts_hold(code: str, asserts: Sequence[str], *, cpu_s: int = CPU_S, wall_s: float = WALL_S, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Whether `code` and then every statement of `asserts` run without an exception, all in the same names, in the sandbox.

    Args:
        cpu_s, wall_s, memory_bytes: limits of processor time, time, and address space; code that passes one of them fails.

    Raises:
        OlpackError: the sandbox does not start.
    """
    success = random.randrange(64, 120)
    job: dict[str, object] = {
        "code": code,
        "asserts": list(asserts),
        "cpu": cpu_s,
        "memory": memory_bytes,
        "success": success,
        "parent": os.getpid(),
        "protections": protections(),
    }
    with tempfile.TemporaryDirectory(prefix="olpack-", ignore_cleanup_errors=True) as folder:
        process = _start(folder)
        try:
            printed, complaints = process.communicate(marshal.dumps(job | {"folder": folder}), timeout=wall_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill(process)
    if printed != answer_runner.READY.encode():
        lines = complaints.decode(errors="replace").split("\n")
        reason = next((line for line in reversed(lines) if line.strip()), f"exit code {process.returncode}")
        raise OlpackError(f"The sandbox for answers does not start: {reason}.", "`olpack doctor` reports what this machine offers.")
    return process.returncode == success


def _start(folder: str) -> subprocess.Popen[bytes]:
    """The runner in `folder`, without olpack's environment; LD_LIBRARY_PATH and SYSTEMROOT are there for Python itself."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-I", "-X", "utf8", "-c", _START, str(Path(answer_runner.__file__).parent)],
        cwd=folder,
        env=kept | {"HOME": folder, "TMPDIR": folder, "TEMP": folder},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            stream.close()
