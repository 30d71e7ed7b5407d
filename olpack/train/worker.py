"""One process of a training on several GPUs: `torchrun … -m olpack.train.worker JOB`, started by `launch.py`.

Events go to stdout, one JSON object a line: those of `olpack.progress`, and at last a "result", an "error", a "crash" or "interrupted".
Only the first process shows progress and writes; any of them may report why it fails.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator

from olpack import progress, workers
from olpack.errors import OlpackError
from olpack.model.libraries import import_libraries

PROGRESS_EVERY_S = 0.2  # so that a bar moves


def main() -> None:
    """Train with the arguments of the job file."""
    workers.die_with(os.getppid())  # the launcher, which dies with its own parent
    import_libraries()
    from olpack.train.loop import Stopped, run
    from olpack.train.processes import Ranks

    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints stays out of the pipe

    def send(event: str, **fields: object) -> None:
        # In one write, so that lines of several processes do not mix.
        os.write(pipe.fileno(), (json.dumps({"event": event, **fields}) + "\n").encode())

    try:
        ranks = Ranks(Accelerator(cpu=not torch.cuda.is_available()))
        if ranks.first:
            progress.use("json", out=pipe, every=PROGRESS_EVERY_S)
            send("started", pid=os.getpid())
        else:
            progress.show("quiet")
        # Written by our own parent a moment ago, in a folder that only this user can enter.
        result = run(**pickle.loads(Path(sys.argv[1]).read_bytes()), ranks=ranks)
        ranks.wait()
        if ranks.first:
            send("result", result=asdict(result))
    except OlpackError as error:
        send("error", problem=error.problem, remedy=error.remedy)
        sys.exit(1)
    except KeyboardInterrupt as error:
        send("interrupted")
        # Stopped, all processes end alike; otherwise the others wait for this one, and the launcher must end them.
        sys.exit(0 if isinstance(error, Stopped) else 1)
    except BaseException:
        send("crash", text=traceback.format_exc())
        sys.exit(1)


if __name__ == "__main__":
    main()
