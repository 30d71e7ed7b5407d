"""The worker process: `python -m olpack.memory.worker < job.json`. A `Job` comes on stdin, an `Answer` goes to stdout, both as JSON.

llama.cpp's converter needs its own `gguf` package, and llama.cpp ends the process where a header is not what it expects.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from olpack.errors import OlpackError
from olpack.memory.dry_run import dry_run
from olpack.memory.job import Answer, Job, Result


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # llama.cpp and the converter may print
    job = TypeAdapter(Job).validate_json(sys.stdin.read())
    try:
        answer = Answer(Result(dry_run(Path(job.file), job.setting)) if job.file else _of_folder(job))
    except OlpackError as error:
        answer = Answer(problem=error.problem, remedy=error.remedy)
    json.dump(asdict(answer), answers)
    answers.flush()


def _of_folder(job: Job) -> Result:
    """The tensors of each quant's file, and a dry run of one of them."""
    from olpack.export import converter

    converter.use_converter(Path(job.converter))
    from olpack.export.plan import header_only_gguf, plan_files
    from olpack.quants import quant_type

    model = converter.open_model(Path(job.folder), vocabulary=False)
    with header_only_gguf(model) as header_gguf:
        plans = plan_files(model, header_gguf, [quant_type(name) for name in job.quants])
        run = dry_run(header_gguf, job.setting)
    return Result(run, {plan.quant.name: [(name, nbytes) for name, _, nbytes in plan.tensors] for plan in plans})


if __name__ == "__main__":
    main()
