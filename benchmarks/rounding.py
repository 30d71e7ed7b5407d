"""What `rounding: search` gives: how far quants are from the unquantized model with ggml's scales and with searched ones, and what that takes.

    python benchmarks/rounding.py --work /tmp/rounding --model builtin/tiny-coder --model SmolLM2-135M     # it goes on where it was

The importance matrix is collected on training rows of the shipped chats. KL divergence, perplexity and the same top token are measured on held-out
rows, over their target tokens, and over all tokens of texts that have nothing to do with programs. The seconds are of this process's CPU time for
all matrices of the file, with one thread: ggml's own function, and the search with all that it needs. Prints Markdown tables and writes them to
benchmarks/rounding.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gguf
import numpy as np
from page import command_line, measured_here, publish

from olpack import recipe
from olpack.compare.other_text import OTHER_TEXTS
from olpack.compare.perplexity import perplexity, ratio
from olpack.export import Target, collect_importance, export
from olpack.export.importance import read_importance
from olpack.llamacpp import library
from olpack.llamacpp.engine import Engine
from olpack.llamacpp.logits import kl_divergence, log_softmax
from olpack.quants import Rounding
from olpack.stages.build import Build

REPOSITORY = Path(__file__).resolve().parents[1]
QUANTS = ("Q4_0", "Q4_1", "Q5_0", "IQ4_NL", "Q4_K_M", "Q2_K", "Q3_K_S", "Q6_K")
NARROW = ("Q4_0", "Q4_K_M")  # for models whose rows are no multiples of 256, which K-quants need
ROUNDINGS: tuple[Rounding, ...] = ("ggml", "search")
IMPORTANCE_TOKENS = 2_048
TARGET_TOKENS = {"held-out rows": 1_200, "other text": 600}


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder that keeps what is done")
    parser.add_argument("--model", type=Path, action="append", required=True, help="a model's folder, or builtin/tiny-coder. Repeatable")
    arguments = parser.parse_args()
    text = [
        "# What searched scales give\n",
        __doc__.split("\n\n")[2].replace("Prints Markdown tables and writes them to\nbenchmarks/rounding.md.", "").strip(),
    ]
    for model in arguments.model:
        base = str(model.resolve()) if model.is_dir() else str(model)
        text += page_of(base, arguments.work / model.name)
    publish([*text, "", measured_here(__file__)], arguments.output)


def page_of(base: str, work: Path) -> list[str]:
    """The tables of one model."""
    build = Build(recipe.load(REPOSITORY / "modelfiles/coding-assistant/recipe.yaml", [f"base={base}"]), out=work)
    train, held_out = build.rows
    texts = {
        "held-out rows": [(row.ids, row.loss_mask) for row in held_out],
        "other text": [(ids, [False] + [True] * (len(ids) - 1)) for ids in (build.renderer.tokenizer(one)["input_ids"] for one in OTHER_TEXTS)],
    }
    texts = {name: up_to(rows, TARGET_TOKENS[name]) for name, rows in texts.items()}
    exact, matrix = work / "F32.gguf", work / "importance.gguf"
    if not exact.is_file():
        export(build.base.path, [Target("F32", exact)])
    if not matrix.is_file():
        collect_importance(
            exact, [ids for ids, _ in up_to([(row.ids, [True] * len(row.ids)) for row in train], IMPORTANCE_TOKENS)], matrix, dataset="train"
        )
    measured = Measured(work, texts)
    unquantized = measured.of("F32", lambda: (exact, 0.0))
    text = [f"\n## {Path(base).name}, {exact.stat().st_size / 4e6:.0f} M parameters\n"]
    for name, rows in texts.items():
        counts = [sum(mask) for _, mask in rows]
        value, _ = perplexity([row["loss"] for row in unquantized[name]], counts)
        text.append(f"{name.capitalize()}: {sum(counts):,} tokens of {len(rows)} rows, perplexity {value:.3f} unquantized.")
    text += ["", "| quant | size | rounding | KL, held-out rows | 99 % | perplexity | same top | KL, other text | perplexity | same top | CPU time |"]
    text += ["| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    divergences: dict[str, list[float]] = {}
    for quant in NARROW if build.base.config["hidden_size"] % 256 else QUANTS:
        for importance in (None, matrix):
            for rounding in ROUNDINGS:
                label = f"{rounding}, with importance" if importance else rounding
                path = work / f"{quant}-{label}.gguf"

                def made(quant=quant, path=path, importance=importance, rounding=rounding) -> tuple[Path, float]:
                    export(build.base.path, [Target(quant, path)], importance=importance, rounding=rounding)
                    return path, encoding_seconds(exact, path, importance, rounding)

                figures = measured.of(f"{quant}, {label}", made)
                path.unlink(missing_ok=True)
                inside, outside = (cells(figures[name], [sum(mask) for _, mask in rows]) for name, rows in texts.items())
                row = [quant, f"{figures['size'] / 1e6:.1f} MB", label, *inside, outside[0], *outside[2:], f"{figures['seconds']:.2f} s"]
                text.append(f"| {' | '.join(row)} |")
                divergences.setdefault(label, []).extend(sum(sum(one["divergences"]) for one in figures[name]) for name in texts)
    text.append("\nKL divergence with the search over that with ggml's scales, geometric mean over these quants and both texts:")
    for label, kind in (("without importance", ""), ("with", ", with importance")):
        ratios = np.array(divergences[f"search{kind}"]) / np.array(divergences[f"ggml{kind}"])
        text.append(f"- {label}: {np.exp(np.log(ratios).mean()):.3f}, lower in {(ratios < 1).sum()} of {len(ratios)}")
    return text


def up_to(rows: Sequence[tuple[Sequence[int], Sequence[bool]]], tokens: int) -> list[tuple[Sequence[int], Sequence[bool]]]:
    """Rows from the first on, up to so many target tokens."""
    ends = np.cumsum([sum(mask) for _, mask in rows])
    return [row for row, end in zip(rows, ends, strict=True) if end <= tokens]


class Measured:
    """Figures of files: for each text and row the sums over its target tokens, kept in a file."""

    def __init__(self, work: Path, texts: dict[str, list]):
        self._texts, self._exact, self._record = texts, work / "F32.gguf", work / "measured.json"
        self._found: dict[str, dict] = json.loads(self._record.read_text()) if self._record.is_file() else {}
        self._reference: dict[str, list[np.ndarray]] = {}

    def of(self, name: str, made: Callable[[], tuple[Path, float]]) -> dict:
        """Of a file that `made` writes, with the seconds that its encoding took, unless they are known."""
        if name not in self._found:
            file, seconds = made()
            self._reference = self._reference or {
                text: [scores.astype(np.float32) for scores in self._scores(self._exact, text)] for text in self._texts
            }
            self._found[name] = {text: list(self._rows(file, text)) for text in self._texts} | {"size": file.stat().st_size, "seconds": seconds}
            self._record.write_text(json.dumps(self._found))
        return self._found[name]

    def _rows(self, file: Path, text: str) -> Iterator[dict]:
        for exact, scores, (ids, mask) in zip(self._reference[text], self._scores(file, text), self._texts[text], strict=True):
            targets = [token for token, counts in zip(ids, mask, strict=True) if counts]
            yield {
                "divergences": [kl_divergence(*pair) for pair in zip(exact, scores, strict=True)],
                "loss": -float(scores[np.arange(len(targets)), targets].sum()),
                "same": int((exact.argmax(axis=1) == scores.argmax(axis=1)).sum()),
            }

    def _scores(self, file: Path, text: str) -> Iterator[np.ndarray]:
        """For one row after the other, natural-log probabilities [target tokens, vocabulary]."""
        rows = self._texts[text]
        with Engine(file, max(len(ids) for ids, _ in rows), 1) as engine:
            for ids, mask in rows:
                yield np.stack([log_softmax(logits) for _, logits in engine.scored(ids, mask)])


def cells(rows: Sequence[dict], counts: Sequence[int]) -> list[str]:
    """Mean KL divergence ± standard error and 99th percentile in millinats a token, perplexity, share of tokens with the same top."""
    mean, error = ratio([sum(row["divergences"]) for row in rows], counts)
    tail = np.percentile(np.concatenate([row["divergences"] for row in rows]), 99)
    value, _ = perplexity([row["loss"] for row in rows], counts)
    same = sum(row["same"] for row in rows) / sum(counts)
    return [f"{1000 * mean:.2f} ± {1000 * (error or 0):.2f}", f"{1000 * tail:.0f}", f"{value:.3f}", f"{same:.2%}"]


def encoding_seconds(exact: Path, file: Path, importance: Path | None, rounding: Rounding) -> float:
    """CPU seconds to make a file's quantized tensors: by ggml's function, or by the search, which begins with ggml's result."""
    weights = read_importance(importance) if importance else None
    types = {one.name: int(one.tensor_type) for one in gguf.GGUFReader(file).tensors}
    library.quantize_rows(library.tensor_type("q4_K"), np.ones((1, 256), np.float32), np.empty(144, np.uint8), search=True)  # compiled by then
    seconds = 0.0
    for one in gguf.GGUFReader(exact).tensors:
        type_ = types[one.name]
        if type_ == library.tensor_type("f32"):
            continue
        rows = np.ascontiguousarray(one.data)
        out = np.zeros((len(rows), library.row_size(type_, rows.shape[1])), np.uint8)
        columns = weights.weights(one.name, 1)[0] if weights and one.name in weights.tensors else None
        started = time.thread_time()
        if rounding == "search":
            library.quantize_rows(type_, rows, out, columns, search=True)
        else:
            library.ggml().ggml_quantize_chunk(
                type_, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None if columns is None else columns.ctypes.data
            )
        seconds += time.thread_time() - started
    return seconds


if __name__ == "__main__":
    main()
