"""The worker process: `python -m olpack.export.worker CONVERTER_FOLDER`, driven by `client.py` over a pipe.

One JSON object a line comes in on stdin ({"do": "check", "round", "export", "collect" or "measure", …}), JSON objects go out on stdout until one has
"result", "error" or "crash", and "has_gpu"; warnings come as events of `olpack.progress`. {"do": "begin"} imports the converter and has no answer:
what fails then fails again in the first job. End of input ends the process, also in the middle of an export: its partial files go with it.
"""

from __future__ import annotations

import _thread
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from olpack import progress
from olpack.errors import OlpackError


def main() -> None:
    """Serve jobs until the input ends."""
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints stays out of the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the client decides what a Ctrl-C means
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    progress.use("json", out=pipe)
    lock = threading.Lock()

    def send(**message: object) -> None:
        with lock:
            pipe.write(json.dumps(message, default=_plain) + "\n")
            pipe.flush()

    jobs = _read_jobs()
    converter_ready = False
    while (job := jobs.get()) is not None:
        do = job.pop("do")
        try:
            from olpack.export import converter, importance, run, sensitivity

            if do == "export":  # a GPU starts while the converter is imported
                job["gpu"] = run.begin_gpu_encoder(job["source"], job["options"])
            if not converter_ready:
                converter.use_converter(Path(sys.argv[1]))
                converter_ready = True
            if do == "begin":
                continue
            functions: dict[str, Callable[..., object]] = {
                "check": run.check,
                "export": run.export,
                "collect": importance.collect,
                "measure": sensitivity.measure,
                "round": run.round_matrices,
            }
            answer = {"result": functions[do](**job, report=_reporter(send))}
        except OlpackError as error:
            answer = {"error": {"problem": error.problem, "remedy": error.remedy}}
        except Exception:
            answer = {"crash": traceback.format_exc()}
        if do != "begin":
            send(**answer, has_gpu=_has_gpu())


def _has_gpu() -> bool:
    """Whether this process has a part of a GPU's memory, as after an export that used it, or a model that llama.cpp loaded there."""
    torch, engine = sys.modules.get("torch"), sys.modules.get("olpack.llamacpp.engine")
    return (torch is not None and torch.cuda.is_initialized()) or (engine is not None and engine.computes_on_gpu())


def _plain(value: object) -> object:
    """What JSON has no form for: results are dataclasses, with paths in them."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _read_jobs() -> queue.SimpleQueue[dict[str, Any] | None]:
    jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            jobs.put(json.loads(line))
        jobs.put(None)
        time.sleep(1)  # an idle worker is gone by now; a busy one has lost its client
        _thread.interrupt_main(signal.SIGTERM)

    threading.Thread(target=read, daemon=True).start()
    return jobs


def _reporter(send: Callable[..., None]) -> Callable[[int, int], None]:
    """Sends how many of how many bytes are written, or tokens read, ten times a second at most."""
    state = {"done": 0, "sent": 0.0}
    lock = threading.Lock()

    def report(count: int, total: int) -> None:
        with lock:
            state["done"] += count
            if time.monotonic() - state["sent"] < 0.1 and state["done"] < total:
                return
            state["sent"] = time.monotonic()
            done = state["done"]
        send(done=done, total=total)

    return report


if __name__ == "__main__":
    main()
