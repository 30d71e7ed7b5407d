"""Start a worker, read its events, and turn its death into a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import olpack
from olpack.compare.job import Job
from olpack.errors import OlpackError
from olpack.llamacpp.library import INSTALL


def events(job: Job) -> Iterator[dict]:
    """Run a worker and give its events as they come. Leaving the loop early ends the worker.

    Raises:
        OlpackError: the worker died, by a signal or otherwise; what it had sent before has been given.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(olpack.__file__).parent.parent), os.environ.get("PYTHONPATH")])),
        "GGML_NO_BACKTRACE": "1",  # on an abort ggml would start a debugger
    }
    with tempfile.TemporaryFile() as errors:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "olpack.compare.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        )
        try:
            try:
                worker.stdin.write(job.model_dump_json().encode())
                worker.stdin.close()
            except BrokenPipeError:
                pass  # it died before reading; its exit status says how
            for line in worker.stdout:
                yield json.loads(line)
            code = worker.wait()
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
            worker.stdout.close()
        if code != 0:
            errors.seek(0)
            raise _death(job.path, code, errors.read().decode(errors="replace"))


def _death(path: Path, code: int, errors: str) -> OlpackError:
    if code < 0 and code == -getattr(signal, "SIGKILL", 0):
        return OlpackError(
            f"The process that measured {path.name} was killed from outside, most likely because memory ran out.",
            "Close what else runs, or load with a shorter context (num_ctx).",
        )
    if code < 0 or code >= 0xC0000000:  # a signal; on Windows an exception code
        name = signal.Signals(-code).name if code < 0 else hex(code)
        said = next((line for line in errors.splitlines() if "GGML_ASSERT" in line or "GGML_ABORT" in line), "")
        return OlpackError(
            f"llama.cpp crashed ({name}) on {path.name}{f': {said.strip()}' if said else ''}.",
            f"If it does so on every file, its build does not suit this machine; this one runs everywhere: {INSTALL}",
        )
    last = errors.strip().splitlines()[-1:] or ["it said nothing"]
    return OlpackError(f"The process that measured {path.name} ended with code {code}: {last[0]}.", "Run `olpack doctor`.")
