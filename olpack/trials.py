"""What others made is tried in a worker first where native code reads it, with limits on time and memory: no Python code ends a loop of that.

The worker does what this process would do next. If it stays within its limits, so does this process.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from olpack import workers
from olpack.errors import OlpackError
from olpack.templating import address_space

_MEMORY = "memory"


class Trial:
    """A worker that tries things, started by the first one.

    Args:
        module: of olpack, which calls `serve`.
    """

    def __init__(self, module: str):
        self._module = module
        self._worker: subprocess.Popen | None = None

    def attempt(self, asked: Any, subject: str, remedy: str, seconds: int, memory: int) -> None:
        """Have the worker do one thing.

        Args:
            asked: what it is, as a JSON value.
            subject: what is tried, for the errors: "The tokenizer in models/x".
            remedy: what to do if it does not pass.
            seconds: that it may take.
            memory: bytes that it may allocate, on Linux.

        Raises:
            OlpackError: it takes more than that, or ends the worker.
        """
        worker = self._running()
        assert worker.stdin and worker.stdout
        try:
            worker.stdin.write(json.dumps([asked, seconds, memory]).encode() + b"\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
        except BrokenPipeError:
            answer = b""
        except BaseException:  # Ctrl-C: the worker's next answer would be that to this question
            self.close()
            raise
        failure = json.loads(answer) if answer.endswith(b"\n") else self._end(worker.wait(), seconds)
        if failure == _MEMORY:
            failure = f"takes more than {memory >> 20:,} MiB of memory"
        if failure:
            self.close()
            raise OlpackError(f"{subject} {failure.rstrip('.')}.", remedy)

    def _running(self) -> subprocess.Popen:
        if self._worker is None or self._worker.poll() is not None:
            self._worker = subprocess.Popen(
                workers.command(self._module),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=workers.environment() | {"ARROW_DEFAULT_MEMORY_POOL": "system", "RUST_BACKTRACE": "0"},
            )
        return self._worker

    @staticmethod
    def _end(code: int, seconds: int) -> str:
        """Why a worker has ended without an answer."""
        if code == -getattr(signal, "SIGALRM", 0):
            return f"takes longer than {seconds} s"
        if code == -signal.SIGABRT:  # an allocation that fails aborts a program in Rust
            return _MEMORY
        return f"ends the process that reads it, with exit code {code}"

    def close(self) -> None:
        """End the worker."""
        if self._worker:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None


def serve(attempt: Callable[[Any], None]) -> None:
    """In the worker: do what is asked, until nothing more is.

    Args:
        attempt: does one thing. What it raises passes, because the process that asks raises it, too; except a panic, and MemoryError.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin.buffer:
        asked, seconds, memory = json.loads(line)
        if hasattr(signal, "alarm"):
            signal.alarm(seconds)  # whose action is the system's, so it also ends native code
        try:
            with address_space(memory):
                attempt(asked)
            failure = ""
        except MemoryError:
            failure = _MEMORY
        except Exception:  # the process that asks gets the same one, and explains it
            failure = ""
        except BaseException as error:  # a panic in Rust
            failure = f"fails: {(str(error).splitlines() or [type(error).__name__])[0]}"
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        print(json.dumps(failure), file=answers, flush=True)
