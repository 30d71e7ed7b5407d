"""What an importance matrix gives: how far quants are from the unquantized fine-tune on held-out rows, with one and without.

    python benchmarks/importance.py --work /tmp/importance          # the same command goes on where it was

Fine-tunes tiny-coder on the shipped chats for one pass, collects the matrix on the training rows with its Q8_0, and measures KL divergence over
the answers of the held-out rows. Prints Markdown tables and writes them to benchmarks/importance.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from page import command_line, measured_here, publish

from olpack import recipe
from olpack.compare.perplexity import ratio
from olpack.data import TokenRow
from olpack.export import Target, collect_importance, export
from olpack.llamacpp.engine import Engine
from olpack.llamacpp.logits import kl_divergence, log_softmax
from olpack.stages.build import Build
from olpack.stages.run import run

REPOSITORY = Path(__file__).resolve().parents[1]
QUANTS = ("Q2_K", "Q3_K_M", "IQ3_S", "IQ4_XS", "Q4_0", "Q4_K_M")
AMOUNTS = (512, 2_048, 8_192, 32_768)  # tokens that a matrix is collected on, besides all there are
AMOUNT_QUANTS = ("Q2_K", "IQ3_S", "Q4_0")


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder that keeps what is done, with room for 300 MB")
    arguments = parser.parse_args()
    asked = recipe.load(REPOSITORY / "modelfiles/coding-assistant/recipe.yaml", ["train.epochs=1"])
    build = Build(asked, out=arguments.work)
    run(build, "train")
    rows, held_out = build.rows
    measured = Measured(arguments.work, held_out)

    files = export_all(build, arguments.work / "without", ("F32", "Q8_0", *QUANTS), None)
    whole = sum(len(row.ids) for row in rows)
    for tokens in (*AMOUNTS, whole):
        matrix = arguments.work / f"importance-{tokens}.gguf"
        if not matrix.is_file():
            collect_importance(files["Q8_0"], [row.ids for row in first(rows, tokens)], matrix, dataset="train.jsonl")
        export_all(build, arguments.work / f"with-{tokens}", QUANTS if tokens == whole else AMOUNT_QUANTS, matrix)

    targets = [row.target_count for row in held_out]
    text = [
        f"# What an importance matrix gives\n\ntiny-coder ({parameters(files['F32'])} M parameters), one pass over the {len(rows)} "
        f"shipped chats; matrix from their {whole:,} tokens.\nKL divergence from the F32 file in millinats a token, over "
        f"{sum(targets):,} answer tokens of "
        f"{len(held_out)} held-out rows, ± standard error with rows as the sampling unit.\n"
    ]
    text += ["| quant | size | without | with | with / without |", "| --- | ---: | ---: | ---: | ---: |"]
    for quant in QUANTS:
        plain, weighed = measured.of(f"without/{quant}"), measured.of(f"with-{whole}/{quant}")
        size = (arguments.work / f"with-{whole}/{quant}.gguf").stat().st_size
        share, error = ratio(weighed, plain)
        text.append(f"| {quant} | {size / 1e6:.2f} MB | {millinats(plain, targets)} | {millinats(weighed, targets)} | {share:.3f} ± {error:.3f} |")
    text += ["\n## How much text\n\nThe same, by the tokens that the matrix was collected on.\n"]
    text += [f"| tokens | {' | '.join(AMOUNT_QUANTS)} |", f"| ---: | {' | '.join(['---:'] * len(AMOUNT_QUANTS))} |"]
    for label, folder in [("none", "without"), *((f"{tokens:,}", f"with-{tokens}") for tokens in (*AMOUNTS, whole))]:
        cells = (millinats(measured.of(f"{folder}/{quant}"), targets) for quant in AMOUNT_QUANTS)
        text.append(f"| {label} | {' | '.join(cells)} |")
    publish([*text, "", measured_here(__file__)], arguments.output)


def first(rows: list[TokenRow], tokens: int) -> list[TokenRow]:
    """Rows from the first on, up to so many tokens."""
    return [row for row, end in zip(rows, np.cumsum([len(row.ids) for row in rows]), strict=True) if end <= tokens]


def export_all(build: Build, folder: Path, quants: tuple[str, ...], importance: Path | None) -> dict[str, Path]:
    """The fine-tune in these types, unless the files are there; paths by type."""
    paths = {quant: folder / f"{quant}.gguf" for quant in quants}
    missing = [Target(quant, path) for quant, path in paths.items() if not path.is_file()]
    export(build.base.path, missing, adapter=build.paths.adapter, importance=importance)
    return paths


class Measured:
    """KL divergence of files from `without/F32.gguf`: nats summed over the answer tokens of each row, kept in a file."""

    def __init__(self, work: Path, rows: list[TokenRow]):
        self._work, self._rows, self._record = work, rows, work / "measured.json"
        self._found: dict[str, list[float]] = json.loads(self._record.read_text()) if self._record.is_file() else {}
        self._reference: list[np.ndarray] = []

    def of(self, name: str) -> list[float]:
        """Of the file `NAME.gguf` in the working folder."""
        if name not in self._found:
            self._reference = self._reference or list(self._predictions("without/F32"))
            pairs = zip(self._reference, self._predictions(name), strict=True)
            self._found[name] = [sum(map(kl_divergence, exact, rounded)) for exact, rounded in pairs]
            self._record.write_text(json.dumps(self._found))
        return self._found[name]

    def _predictions(self, name: str):
        """For one row after the other, natural-log probabilities [answer tokens, vocabulary]."""
        with Engine(self._work / f"{name}.gguf", max(len(row.ids) for row in self._rows)) as engine:
            for row in self._rows:
                yield np.stack([log_softmax(logits) for _, logits in engine.scored(row.ids, row.loss_mask)])


def millinats(sums: list[float], tokens: list[int]) -> str:
    mean, error = ratio(sums, tokens)
    return f"{1000 * mean:.2f} ± {1000 * error:.2f}"


def parameters(file: Path) -> str:
    return f"{file.stat().st_size / 4e6:.0f}"


if __name__ == "__main__":
    main()
