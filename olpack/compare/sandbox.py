"""Run an answer's Python and the statements that must hold after it, in a process of its own that can be stopped.

This keeps an endless loop, a memory hog or a crash from doing harm, in a folder that is thrown away. It is no wall against malice: the code
runs as the user. It comes from a model that the user has trained, and runs only because a task asks for it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress

CPU_S = 5
WALL_S = 10
MEMORY_BYTES = 1 << 30

# Reads what to do, limits itself, and ends with the agreed code if all held: an exit of the answer's own is no success.
_RUNNER = """
import json, os, sys
job = json.load(sys.stdin)
try:
    import resource
    for limit, value in (("RLIMIT_CPU", job["cpu"]), ("RLIMIT_AS", job["memory"]), ("RLIMIT_FSIZE", 1 << 20), ("RLIMIT_CORE", 0)):
        resource.setrlimit(getattr(resource, limit), (value, value))
except ImportError:
    pass  # Windows has no such limits; the time limit holds there too
names = {"__name__": "answer"}
try:
    exec(compile(job["code"], "answer", "exec"), names)
    for statement in job["asserts"]:
        exec(compile(statement, "task", "exec"), names)
except BaseException:
    os._exit(1)
os._exit(job["success"])
"""


def holds(code: str, asserts: Sequence[str], *, cpu_s: int = CPU_S, wall_s: float = WALL_S, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Whether `code` runs and every statement of `asserts` runs after it, in its names, without an exception.

    Args:
        cpu_s, wall_s, memory_bytes: limits of processor time, time, and address space; past one of them it does not hold.
    """
    success = random.randrange(64, 120)
    job = {"code": code, "asserts": list(asserts), "cpu": cpu_s, "memory": memory_bytes, "success": success}
    with tempfile.TemporaryDirectory(prefix="olpack-", ignore_cleanup_errors=True) as folder:
        kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER],
            cwd=folder,
            env=kept | {"HOME": folder, "TMPDIR": folder, "TEMP": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(job).encode(), timeout=wall_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)
    return process.returncode == success


def _end(process: subprocess.Popen) -> None:
    """End the process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()
