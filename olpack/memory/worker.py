"""The worker process: `python -m olpack.memory.worker < job.json`. One job, one JSON object on stdout: {"result": …} or {"error": …}.

llama.cpp's converter needs its own `gguf` package, and llama.cpp ends the process where a header is not what it expects.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from olpack.errors import OlpackError
from olpack.memory.dry_run import dry_run


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # llama.cpp and the converter may print
    job = json.load(sys.stdin)
    try:
        answer = {"result": _of_file(job) if job["file"] else _of_folder(job)}
    except OlpackError as error:
        answer = {"error": {"problem": error.problem, "remedy": error.remedy}}
    json.dump(answer, answers)
    answers.flush()


def _of_file(job: dict[str, Any]) -> dict[str, Any]:
    return dry_run(Path(job["file"]), job["setting"])


def _of_folder(job: dict[str, Any]) -> dict[str, Any]:
    """What each quant's file would hold, and a dry run of llama.cpp: cache and graph are the same whatever the weights' types."""
    from olpack.export import converter

    converter.use_converter(Path(job["converter"]))
    from olpack.export.plan import header_only_gguf, plan_files
    from olpack.quants import quant_type

    model = converter.open_model(Path(job["folder"]), vocabulary=False)
    with header_only_gguf(model) as header_gguf:
        plans = plan_files(model, header_gguf, [quant_type(name) for name in job["quants"]])
        found = dry_run(header_gguf, job["setting"])
    return {**found, "tensors": {plan.quant.name: [[name, nbytes] for name, _, nbytes in plan.tensors] for plan in plans}}


if __name__ == "__main__":
    main()
