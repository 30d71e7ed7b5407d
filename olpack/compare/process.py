"""Start a worker that measures a file, read its events, and explain its end."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator

from olpack import workers
from olpack.compare.job import Job
from olpack.llamacpp.library import INSTALL


def events(job: Job) -> Iterator[dict]:
    """Run a worker and give its events as they come. Leaving the loop early ends the worker.

    Raises:
        OlpackError: the worker died, by a signal or otherwise; what it had sent before has been given.
    """
    with tempfile.TemporaryFile() as errors:
        worker = subprocess.Popen(
            workers.command("olpack.compare.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=workers.environment(offline=False),  # suites take their data from the Hub
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
            raise workers.exit_error(
                f"The process that measured {job.path.name}",
                code,
                errors.read().decode(errors="replace"),
                "Run `olpack doctor`.",
                crash_remedy=f"If every file crashes it, the build of llama.cpp does not suit this machine; this one runs everywhere: {INSTALL}",
                memory_remedy="Close other programs, or load with a shorter context (num_ctx).",
            )
