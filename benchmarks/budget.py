"""What a budget gives: types chosen by measured sensitivity against llama.cpp's mixes of the same size, on held-out rows.

    python benchmarks/budget.py --work /tmp/budget          # the same command goes on where it was

Fine-tunes tiny-coder on the shipped chats for one pass, collects the importance matrix and measures the sensitivity on training rows, as a build
does, and gives each mix's bits per weight to the budget; then some round budgets, against the mixes around them. Everything is quantized with
the same matrix. Prints Markdown and writes it to benchmarks/budget.md.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import gguf
from importance import REPOSITORY, Measured, millinats, parameters
from page import command_line, measured_here, publish

from olpack import recipe
from olpack.compare.perplexity import ratio
from olpack.export import Target, export
from olpack.stages.build import Build
from olpack.stages.run import run

MIXES = ("Q2_K", "IQ3_S", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M")
BUDGETS = (3.5, 4.5, 5.5)


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder that keeps what is done, with room for 300 MB")
    arguments = parser.parse_args()
    quants = [*MIXES, *(f"{bits}bpw" for bits in BUDGETS)]
    asked = recipe.load(
        REPOSITORY / "modelfiles/coding-assistant/recipe.yaml", ["train.epochs=1", "export.importance=train", f"quants=[{', '.join(quants)}]"]
    )
    build = Build(asked, out=arguments.work)
    for stage in ("train", "export"):
        run(build, stage)
    _, held_out = build.rows
    measured, targets = Measured(arguments.work, held_out), [row.target_count for row in held_out]

    unquantized = arguments.work / "without/F32.gguf"
    if not unquantized.is_file():
        export(build.base.path, [Target("F32", unquantized)], adapter=build.paths.adapter)
    files = [Made(build.paths.gguf(quant.name)) for quant in build.quants]
    text = [
        f"# What a budget gives\n\ntiny-coder ({parameters(unquantized)} M parameters), one pass over the shipped chats; "
        f"importance matrix and sensitivity from its training rows.\nKL divergence from the F32 file in millinats a token, over "
        f"{sum(targets):,} answer tokens of {len(held_out)} held-out rows, ± standard error with rows as the sampling unit; the difference "
        "is paired by row.\n\n## At the size of a mix\n"
    ]
    text += ["| mix | bits per weight | mix | budget | difference | budget / mix |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for mix, made in zip(MIXES, files, strict=False):
        within = Made(of_size(build, arguments.work / "budgets", made.bits_per_weight))
        plain, chosen = (measured.of(str(file.path.relative_to(arguments.work).with_suffix(""))) for file in (made, within))
        difference, error = ratio([one - other for one, other in zip(chosen, plain, strict=True)], targets)
        share, share_error = ratio(chosen, plain)
        text.append(
            f"| {mix} | {made.bits_per_weight:.3f}, {within.bits_per_weight:.3f} | {millinats(plain, targets)} | "
            f"{millinats(chosen, targets)} | {1000 * difference:+.2f} ± {1000 * error:.2f} | {share:.3f} ± {share_error:.3f} |"
        )
    text += [
        "\n## Round budgets, among the mixes\n",
        "| file | bits per weight | size | KL divergence | types of its matrices |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for quant, made in sorted(zip(quants, files, strict=True), key=lambda pair: pair[1].bits_per_weight):
        lost = measured.of(str(made.path.relative_to(arguments.work).with_suffix("")))
        cells = (quant, f"{made.bits_per_weight:.3f}", f"{made.path.stat().st_size / 1e6:.2f} MB", millinats(lost, targets), made.types)
        text.append(f"| {' | '.join(cells)} |")
    publish([*text, "", measured_here(__file__)], arguments.output)


def of_size(build: Build, folder: Path, bits_per_weight: float) -> Path:
    """The fine-tune with at most so many bits per weight, unless it is there."""
    quant = f"{math.floor(bits_per_weight * 1e5) / 1e5:.5f}bpw"
    path = folder / f"{quant}.gguf"
    if not path.is_file():
        export(
            build.base.path,
            [Target(quant, path)],
            adapter=build.paths.adapter,
            importance=build.paths.importance,
            sensitivity=build.paths.sensitivity,
        )
    return path


class Made:
    """A file, and what its header says of its tensors."""

    def __init__(self, path: Path):
        tensors = gguf.GGUFReader(path).tensors
        self.path = path
        self.bits_per_weight = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)
        counts = Counter(tensor.tensor_type.name for tensor in tensors if tensor.tensor_type.name != "F32")
        self.types = ", ".join(f"{count} × {name}" for name, count in sorted(counts.items()))


if __name__ == "__main__":
    main()
