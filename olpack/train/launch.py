"""Training on several GPUs: start torchrun or `accelerate launch` on `worker.py`, show its progress, and turn its end into a result or an error.

Only this process knows of the build; it has the lock and waits.
"""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from olpack import progress, workers
from olpack.errors import OlpackError
from olpack.train.result import TrainResult
from olpack.workspace import scratch

if TYPE_CHECKING:
    from olpack.recipe import Train

_END_S = 30.0  # for processes that were asked to end


def launcher(settings: Train) -> list[str] | None:
    """The command that starts the processes, without the module that they run; None where this process trains by itself.

    Raises:
        OlpackError: there are fewer GPUs than the recipe asks for, or the launcher is no program.
    """
    if settings.launch is not None:
        command = shlex.split(settings.launch)
        if not command or shutil.which(command[0]) is None:
            raise OlpackError(
                f"`train.launch` begins with {command[0] if command else 'nothing'}, which is no program here.",
                "Write it as in: torchrun --nproc-per-node 2",
            )
        return command
    if settings.gpus == 1:
        return None
    import torch

    visible = torch.cuda.device_count()
    count = visible if settings.gpus == "all" else settings.gpus
    if settings.gpus != "all" and count > visible:
        raise OlpackError(f"`train.gpus` is {count}, and {visible} can be seen here.", "Set it to `all`, or check CUDA_VISIBLE_DEVICES.")
    if count < 2:
        return None
    return [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]


def run_launched(command: list[str], job: dict[str, Any]) -> TrainResult:
    """Train in the processes that a launcher starts.

    Args:
        command: of `launcher`.
        job: the arguments of `loop.run`.

    Raises:
        OlpackError: what one of the processes raised, or how it died.
        KeyboardInterrupt: after the checkpoint has been written.
    """
    with scratch() as folder, tempfile.TemporaryFile() as log:
        file = folder / "job.pickle"
        file.write_bytes(pickle.dumps(job))
        # A session of its own: the terminal's Ctrl-C reaches this process alone, which asks the first of the others to stop.
        process = subprocess.Popen(
            workers.program(*command, "-m", "olpack.train.worker", str(file)),
            env=workers.environment() | {"PYTHONSAFEPATH": "1"},  # the launcher starts Python, so -P cannot be given
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        output = process.stdout
        assert output is not None  # it is a pipe
        try:
            ended = _follow(output)
        finally:
            output.close()
            _end(process)
        if ended.get("event") == "result":
            return TrainResult(**ended["result"])
        if ended.get("event") == "interrupted":
            raise KeyboardInterrupt
        if ended.get("event") == "error":
            raise OlpackError(ended["problem"], ended["remedy"])
        log.seek(0)
        raise _death(process.returncode, ended.get("text", ""), log.read().decode(errors="replace"))


def _follow(output: IO[bytes]) -> dict[str, Any]:
    """Show events until the output ends; returns the one that reports how it ended."""
    relay, first = progress.Relay(), 0
    ended: dict[str, Any] = {}
    lines = iter(output.readline, b"")
    with relay:
        while True:
            try:
                for line in lines:
                    event = _event(line)
                    if event.get("event") == "started":
                        first = event["pid"]
                    elif event.get("event") in ("result", "error", "crash", "interrupted"):
                        # The first to fail knows why; the others only lost it. An error in a sentence says more than a crash.
                        ended = event if not ended or (event["event"] == "error" and ended["event"] == "crash") else ended
                    elif event:
                        relay.show(event)
                return ended
            except KeyboardInterrupt:
                if not first:
                    raise
                with suppress(ProcessLookupError):
                    os.kill(first, signal.SIGINT)  # it finishes its step and writes the checkpoint, and so do the others
                first = 0  # another Ctrl-C is immediate


def _event(line: bytes) -> dict[str, Any]:
    """An event of the worker; nothing where the launcher printed something of its own."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) and "event" in event else {}


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=_END_S if process.poll() is None and sys.exc_info()[0] is None else 0.1)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _death(code: int, crash: str, log: str) -> OlpackError:
    if "Signal 9 (SIGKILL)" in log:  # torchrun reports how a process ended, and itself ends with 1
        code = workers.KILLED
    reason = crash or "\n".join(line for line in log.splitlines() if "Error" in line)
    error = workers.exit_error("A training process", code, reason, "The same command goes on from the last checkpoint.")
    error.add_note(crash or log[-4000:])  # shown with the traceback, which --debug asks for
    return error
