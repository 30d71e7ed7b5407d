"""What `rounding: search` and `rounding: learned` give: how far quants are from the unquantized model with ggml's blocks, with searched scales and
with rounding by output, and what that takes.

    python benchmarks/rounding.py --work /tmp/rounding --model builtin/tiny-coder --model builtin/smollm2-135m     # it goes on where it was

The importance matrix is collected on training rows of the shipped chats, 2,048 tokens, and matrices are rounded by their outputs on 16,384 tokens of
them. KL divergence, perplexity and the same top token are measured on held-out rows, over their target tokens, and over all tokens of texts that have
nothing to do with programs. The seconds are of CPU time for all matrices of the file, with one thread: ggml's own function, and the search with all
that it needs. The last table is of a fine-tune: the shipped coding assistant, built with `rounding: learned`, its 200 tasks, and how much of the
fine-tune's gain over its base a quant keeps. Prints Markdown tables and writes them to benchmarks/rounding.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gguf
import numpy as np
import psutil
import torch
from page import command_line, measured_here, publish

from olpack import recipe
from olpack.compare.gain import gain_of_rows, gain_of_tasks
from olpack.compare.other_text import OTHER_TEXTS
from olpack.compare.perplexity import perplexity, ratio
from olpack.compare.results import read_results
from olpack.export import ExportOptions, Target, collect_importance, export
from olpack.export.client import Converter
from olpack.export.importance import read_importance
from olpack.llamacpp import library
from olpack.llamacpp.engine import Engine
from olpack.llamacpp.logits import kl_divergence, log_softmax
from olpack.quants import Rounding
from olpack.recipe import Export
from olpack.stages.build import Build
from olpack.stages.calibration import rounding_rows, train_scales
from olpack.stages.run import run
from olpack.workspace import remove

REPOSITORY = Path(__file__).resolve().parents[1]
QUANTS = ("Q4_0", "Q4_1", "Q5_0", "IQ4_NL", "Q4_K_M", "Q5_K_M", "Q2_K", "Q3_K_S", "Q6_K", "Q8_0")
NARROW = ("Q4_0", "Q4_K_M", "Q2_K", "Q3_K_S")  # for models whose rows are no multiples of 256, which K-quants need; with importance only
KINDS: tuple[tuple[Rounding, bool], ...] = (("ggml", False), ("search", False), ("ggml", True), ("search", True), ("learned", True))
IMPORTANCE_TOKENS = 2_048
TARGET_TOKENS = {"held-out rows": 1_200, "other text": 600}


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder that keeps what is done")
    parser.add_argument("--model", type=Path, action="append", required=True, help="a model's folder or GGUF, or builtin/NAME. Repeatable")
    parser.add_argument("--scale-steps", type=int, default=Export().scale_steps, help="in which block scales are trained")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp while it reads text")
    arguments = parser.parse_args()
    text = [
        "# What searched scales and rounding by output give\n",
        __doc__.split("\n\n")[2].replace("Prints Markdown tables and writes them to benchmarks/rounding.md.", "").strip(),
    ]
    for model in arguments.model:
        base = str(model.resolve()) if model.is_dir() else str(model)
        text += page_of(base, arguments.work / model.name, arguments.threads, arguments.scale_steps)
        remove(arguments.work / model.name / "blocks")
    if any(model.name == "tiny-coder" for model in arguments.model):
        text += gain_of_a_fine_tune(arguments.work)
    publish([*text, "", measured_here(__file__)], arguments.output)


def page_of(base: str, work: Path, threads: int, scale_steps: int) -> list[str]:
    """The tables of one model."""
    build = Build(recipe.load(REPOSITORY / "modelfiles/coding-assistant/recipe.yaml", [f"base={base}"]), out=work)
    train, held_out = build.rows
    texts = {
        "held-out rows": [(row.ids, row.loss_mask) for row in held_out],
        "other text": [(ids, [False] + [True] * (len(ids) - 1)) for ids in (build.renderer.tokenizer(one)["input_ids"] for one in OTHER_TEXTS)],
    }
    texts = {name: up_to(rows, TARGET_TOKENS[name]) for name, rows in texts.items()}
    exact, matrix, requantize = work / "F32.gguf", work / "importance.gguf", build.base.gguf is not None
    if not exact.is_file():
        export(build.base.source, [Target("F32", exact)], requantize=requantize)
    if not matrix.is_file():
        collect_importance(
            exact,
            [ids for ids, _ in up_to([(row.ids, [True] * len(row.ids)) for row in train], IMPORTANCE_TOKENS)],
            matrix,
            dataset="train",
            threads=threads,
        )
    measured = Measured(work, texts, threads)
    unquantized = measured.of("F32", lambda: (exact, 0.0))
    text = [f"\n## {Path(base).name}, {exact.stat().st_size / 4e6:.0f} M parameters\n"]
    for name, rows in texts.items():
        counts = [sum(mask) for _, mask in rows]
        value, _ = perplexity([row["loss"] for row in unquantized[name]], counts)
        text.append(f"{name.capitalize()}: {sum(counts):,} tokens of {len(rows)} rows, perplexity {value:.3f} unquantized.")
    text += ["", "| quant | size | rounding | KL, held-out rows | 99 % | perplexity | same top | KL, other text | perplexity | same top | CPU time |"]
    text += ["| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    divergences: dict[str, list[list[float]]] = {}
    narrow = build.base.config["hidden_size"] % 256 > 0
    quants, kinds = (NARROW, [kind for kind in KINDS if kind[1]]) if narrow else (QUANTS, KINDS)
    by_output = RoundingByOutput(build, work, quants, matrix, threads, scale_steps)
    for quant in quants:
        for rounding, with_importance in kinds:
            importance = matrix if with_importance else None
            label = f"{rounding}, with importance" if importance else rounding
            path = work / f"{quant}-{label}.gguf"

            def made(quant=quant, path=path, importance=importance, rounding=rounding) -> tuple[Path, float]:
                if rounding == "learned":
                    return by_output.write(quant, path), 0.0
                export(build.base.source, [Target(quant, path)], importance=importance, rounding=rounding, requantize=requantize)
                return path, encoding_seconds(exact, path, importance, rounding)

            figures = measured.of(f"{quant}, {label}", made)
            path.unlink(missing_ok=True)
            inside, outside = (cells(figures[name], [sum(mask) for _, mask in rows]) for name, rows in texts.items())
            seconds = f"{figures['seconds']:.2f} s" if rounding != "learned" else "below"
            row = [quant, f"{figures['size'] / 1e6:.1f} MB", label, *inside, outside[0], *outside[2:], seconds]
            text.append(f"| {' | '.join(row)} |")
            divergences.setdefault(label, []).append([sum(sum(one["divergences"]) for one in figures[name]) for name in texts])
    text.append(f"\n{by_output.sentence()}")
    text += ["\nKL divergence over that with ggml's blocks, each with importance:\n", "| quant | search | learned | search, other text | learned |"]
    text.append("| --- | ---: | ---: | ---: | ---: |")
    ratios = [np.divide(divergences[f"{one}, with importance"], divergences["ggml, with importance"]) for one in ("search", "learned")]
    for quant, *both in zip(quants, *ratios, strict=True):
        text.append(f"| {quant} | {' | '.join(f'{one[place] - 1:+.0%}' for place in (0, 1) for one in both)} |")
    if not narrow:
        without = np.divide(divergences["search"], divergences["ggml"])
        text.append(
            f"\nOf the search without importance, geometric mean over these quants and both texts: {np.exp(np.log(without).mean()) - 1:+.0%}."
        )
    return text


def gain_of_a_fine_tune(work: Path) -> list[str]:
    """The table of the shipped package's fine-tune."""
    asked = [f"quants=[{', '.join(NARROW)}]", "export.rounding=learned", "export.importance=train", "compare.ggml_rounding=tasks"]
    build = Build(recipe.load(REPOSITORY / "modelfiles/coding-assistant/recipe.yaml", asked), out=work)
    run(build)
    results = read_results(build.paths.results)
    base, reference = results.base, results.reference
    assert base and base.scores and base.perplexity and reference and reference.scores
    text = [
        "\n## A fine-tune of tiny-coder\n",
        f"On {sum(results.rows.learned_tokens):,} target tokens of held-out rows and {reference.scores.count} tasks: "
        f"perplexity {base.perplexity.value:.3f} of the base and {reference.perplexity.value:.3f} of the unquantized fine-tune; tasks passed "
        f"{base.scores.mean:.1%} and {reference.scores.mean:.1%}.\n",
        "| quant | rounding | KL | perplexity | same top | tasks passed | gain of loss kept | of tasks |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for quant in results.quants:
        other = quant.by_ggml
        assert other
        for name, one in (("ggml", other), ("learned", quant)):
            assert one.divergence and one.perplexity and one.scores
            kept = (gain_of_rows(results, one), gain_of_tasks(results, one))
            shares = [f"{gain.value:.1%} ± {gain.standard_error or 0:.1%}" if gain and gain.value is not None else "" for gain in kept]
            kl = f"{1000 * one.divergence.mean:.2f} ± {1000 * (one.divergence.standard_error or 0):.2f}"
            cells = [quant.quant, name, kl, f"{one.perplexity.value:.3f}", f"{one.divergence.same_top:.2%}", f"{one.scores.mean:.1%}", *shares]
            text.append(f"| {' | '.join(cells)} |")
    return text


class RoundingByOutput:
    """Quants of a model with `rounding: learned`, whose matrices are rounded at once as in a build: the rows are read once for all of them."""

    def __init__(self, build: Build, work: Path, quants: Sequence[str], importance: Path, threads: int, scale_steps: int):
        self._source, self._quants, self._exact, self._folder = build.base.source, quants, work / "F32.gguf", work / "blocks"
        self._rows = [row.ids for row in rounding_rows(build.rows[0])]
        self._options: ExportOptions = {
            "importance": importance,
            "rounding": "learned",
            "requantize": build.base.gguf is not None,
            "threads": threads,
            "rounded": self._folder,
        }
        self._train, self._scale_steps = build.rows[0], scale_steps
        self._record = work / "rounding.json"

    def write(self, quant: str, path: Path) -> Path:
        if not self._record.is_file():
            self._round()
        scales = {name: Path(file) for name, file in json.loads(self._record.read_text())["scales"].items()}
        export(self._source, [Target(quant, path)], scales=scales, **self._options)
        return path

    def _round(self) -> None:
        """Round all matrices and train block scales, and record seconds and peak memory of both: of CPU time, with a GPU of wall time."""
        with Converter() as converter:
            converter.check(self._source, self._quants, **self._options)  # what it loads at first is not counted
            worker = psutil.Process(converter.pid)

            def clock() -> float:
                return time.monotonic() if torch.cuda.is_available() else sum(worker.cpu_times()[:2])

            started = clock()
            made = converter.round(self._source, self._quants, self._exact, self._rows, self._folder, **self._options)
            seconds = clock() - started
            peak = peak_memory(converter.pid)
        on_gpu = torch.cuda.is_available()
        started = time.monotonic() if on_gpu else time.process_time()
        scales = train_scales(self._exact, made, self._train, self._folder, self._scale_steps)
        took = {"seconds": seconds, "peak": peak, "gpu": on_gpu, "scales": {quant: str(path) for quant, path in scales.items()}}
        took["scale steps"], took["scale seconds"] = self._scale_steps, (time.monotonic() if on_gpu else time.process_time()) - started
        self._record.write_text(json.dumps(took | {"scale peak": peak_memory("self")}))

    def sentence(self) -> str:
        """What was recorded."""
        took = json.loads(self._record.read_text())
        where = "on a GPU" if took["gpu"] else "of CPU time"
        sentence = (
            f"Rounding by output takes {took['seconds']:.0f} s {where} for all matrices of these {len(self._quants)} quants together, "
            f"{sum(map(len, self._rows)):,} tokens read once, and {took['peak'] / 1e9:.1f} GB of memory."
        )
        if not took["scales"]:
            return sentence
        seconds, peak = f"{took['scale seconds']:.0f} s {where}", f"{took['scale peak'] / 1e9:.1f} GB"
        trained = f"Training the block scales of {' and '.join(took['scales'])} in {took['scale steps']} steps takes {seconds} together, and {peak}."
        return f"{sentence} {trained}"


def peak_memory(process: int | str) -> int:
    """Bytes of a process, so far."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def up_to(rows: Sequence[tuple[Sequence[int], Sequence[bool]]], tokens: int) -> list[tuple[Sequence[int], Sequence[bool]]]:
    """Rows from the first on, up to so many target tokens."""
    ends = np.cumsum([sum(mask) for _, mask in rows])
    return [row for row, end in zip(rows, ends, strict=True) if end <= tokens]


class Measured:
    """Figures of files: for each text and row the sums over its target tokens, kept in a file."""

    def __init__(self, work: Path, texts: dict[str, list], threads: int):
        self._threads, self._texts, self._exact, self._record = threads, texts, work / "F32.gguf", work / "measured.json"
        self._found: dict[str, dict] = json.loads(self._record.read_text()) if self._record.is_file() else {}
        self._reference: dict[str, list[np.ndarray]] = {}

    def of(self, name: str, made: Callable[[], tuple[Path, float]]) -> dict:
        """Of a file that `made` writes, with the seconds that its encoding took, unless they are known."""
        if name not in self._found:
            file, seconds = made()
            self._reference = self._reference or {
                text: [scores.astype(np.float32) for scores in self._scores(self._exact, text)] for text in self._texts
            }
            self._found[name] = {text: list(self._rows(file, text)) for text in self._texts} | {
                "size": file.stat().st_size,
                "seconds": seconds,
            }
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
        with Engine(file, max(len(ids) for ids, _ in rows), self._threads) as engine:
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
