"""What an export spends before its first weight, here and in another checkout of olpack: imports and plan, and whether the headers are the same.

    git worktree add ../before COMMIT
    python benchmarks/export_start.py --before ../before --work /scratch [--times 5] [--output benchmarks/export_start.md]

The two run in turn, each time in a new process. The 8B has Llama 3's shape and files with holes in place of weights. "None" stands for packages
that were installed without bytecode, as uv does: Python is to look for it in an empty folder, and one start is not counted, which may fill that.
Where the package index cannot be reached, OLPACK_LLAMA_CPP names llama.cpp's converter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from build_8b import HIDDEN, INTERMEDIATE, ROWS
from export import QUANTS
from page import command_line, environment, measured_here, publish
from random_model import REPOSITORY, write_adapter, write_base

START = """
import hashlib, json, sys, time
began = time.monotonic()
from pathlib import Path
from olpack.export.converter import use_converter
from olpack.llamacpp.source import converter_source
use_converter(converter_source())
from olpack.export import run
marks = [(time.monotonic() - began, time.process_time())]
base, adapter, *quants = sys.argv[1:]
_, plans, *_ = run._prepare(Path(base), quants, {"adapter": adapter})
marks.append((time.monotonic() - began, time.process_time()))
headers = hashlib.sha256(b"".join(plan.header for plan in plans)).hexdigest()
print(json.dumps({"marks": marks, "modules": len(sys.modules), "headers": headers}))
"""


def start(checkout: Path, base: Path, adapter: Path, bytecode: Path | None) -> dict:
    """One start in a process of its own. `bytecode`: the folder for it, in place of those beside the modules."""
    variables = {**environment(), "PYTHONPATH": os.pathsep.join(filter(None, [str(checkout.resolve()), os.environ.get("PYTHONPATH")]))}
    if bytecode is not None:
        variables["PYTHONPYCACHEPREFIX"] = str(bytecode.resolve())
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-P", "-c", START, str(base.resolve()), str(adapter.resolve()), *QUANTS]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables).stdout)


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--before", type=Path, required=True, help="another checkout")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the models")
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    commit = subprocess.check_output(["git", "-C", arguments.before, "rev-parse", "--short", "HEAD"], text=True).strip()
    models = {"2 layers of 512 columns": (512, 1024, 2, None), "8B": (HIDDEN, INTERMEDIATE, 32, ROWS)}
    lines = [measured_here(__file__), "", f"The median of {arguments.times} starts each, in turn; four quants, an adapter of rank 2.", ""]
    lines += [
        "| model | bytecode | olpack | imports, s | processor, s | plan, s | processor, s | modules |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    headers = set()
    for name, (hidden, intermediate, layers, rows) in models.items():
        base, adapter = (arguments.work / f"{kind}-{hidden}" for kind in ("base", "adapter"))
        if not adapter.is_dir():
            write_base(base, hidden, intermediate, layers, rows, llama=True, sparse=True)
            write_adapter(adapter, base, rank=2)
        checkouts = {f"at {commit}": arguments.before, "here": REPOSITORY}
        made = set()
        for bytecode in (True, False):
            runs: dict[str, list[dict]] = {checkout: [] for checkout in checkouts}
            for number in range(arguments.times + (not bytecode)):
                for place, (checkout, folder) in enumerate(checkouts.items()):
                    run = start(folder, base, adapter, None if bytecode else arguments.work / f"bytecode-{hidden}-{place}")
                    made.add(run["headers"])
                    if bytecode or number:
                        runs[checkout].append(run)
            for checkout, found in runs.items():
                imports = [median(run["marks"][0][kind] for run in found) for kind in (0, 1)]
                plan = [median(run["marks"][1][kind] - run["marks"][0][kind] for run in found) for kind in (0, 1)]
                cells = [name, "there" if bytecode else "none", checkout, *(f"{seconds:.2f}" for seconds in [*imports, *plan])]
                lines.append(f"| {' | '.join([*cells, format(found[0]['modules'], ',')])} |")
                print(lines[-1], file=sys.stderr, flush=True)
        headers.add(len(made))
    lines += ["", f"The headers of all files are {'identical' if headers == {1} else 'DIFFERENT'} (SHA-256)."]
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
