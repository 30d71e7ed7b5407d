"""KL divergence and perplexity against transformers on the same weights; what is made for the comparison and what is left of it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch
from test_compare_measure import SETTINGS, quant_file

from olpack.compare.divergence import LogitsWriter, open_logits, summarize
from olpack.compare.measure import measure
from olpack.compare.reference_models import ReferenceModels
from olpack.data.rows import TokenRow
from olpack.errors import OlpackError
from olpack.llamacpp.logits import kl_divergence, log_softmax
from olpack.recipe.tasks import Task

FAST = dataclasses.replace(SETTINGS, prompt_lengths=(16,), repeats=1)
KINDS = ("F16", "BF16", "Q8_0", "Q4_0")


@pytest.fixture(scope="module")
def rows() -> list[TokenRow]:
    """Twelve rows of random tokens, of 20 to 75 tokens, about half of them target tokens."""
    random, vocabulary = np.random.default_rng(0), tiny_gguf.tokenizer().get_vocab_size()
    made = []
    for number in range(12):
        ids = [int(token) for token in random.integers(3, vocabulary, size=20 + 5 * number)]
        made.append(TokenRow(ids, [bool(flag) for flag in random.integers(0, 2, size=len(ids))], "", f"eval.jsonl:{number + 1}"))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One model in each of KINDS; "Q4_0-F32" and the like: the weights of that quant in a float32 file, which llama.cpp runs in float32."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = tiny_gguf.tokenizer()
    model = tiny_gguf.model(tokenizer.get_vocab_size())
    for kind in KINDS:
        tiny_gguf.write(folder / f"{kind}.gguf", model, tokenizer, gguf.GGMLQuantizationType[kind])
        tiny_gguf.write(folder / f"{kind}-F32.gguf", dequantized(folder / f"{kind}.gguf"), tokenizer)
    return folder


def dequantized(path: Path) -> torch.nn.Module:
    """A transformers model in float32 with the weights of a GGUF."""
    model = tiny_gguf.model(tiny_gguf.tokenizer().get_vocab_size())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, model.config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = {}
    for name, weight in model.state_dict().items():
        tensor = stored[names.get_name(name, try_suffixes=(".weight",))]
        weights[name] = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).view(weight.shape)
    model.load_state_dict(weights)
    return model


def reference_models(folder: Path, temporary: Path, wrote: list[str] | None = None, **changes: object) -> ReferenceModels:
    """The model's own GGUF as the reference, another model as the base."""
    tokenizer = tiny_gguf.tokenizer()

    def write_reference(quant: str, path: Path) -> None:
        path.write_bytes((folder / f"{quant}.gguf").read_bytes())
        if wrote is not None:
            wrote.append(quant)

    def write_base(quant: str, path: Path) -> None:
        tiny_gguf.write(path, tiny_gguf.model(tokenizer.get_vocab_size(), seed=1), tokenizer, gguf.GGMLQuantizationType[quant])
        if wrote is not None:
            wrote.append(f"base {quant}")

    return ReferenceModels(
        **{
            "folder": temporary / "temporary",
            "write_reference": write_reference,
            "reference_key": "a",
            "write_base": write_base,
            "base_key": "b",
            "base_quant": "Q8_0",
            **changes,
        }
    )


def by_transformers(path: Path, rows: list[TokenRow]) -> list[torch.Tensor]:
    """Log-probabilities of the target tokens of each row, by transformers in float32 from the file's dequantized weights."""
    model = dequantized(path)
    found = []
    with torch.no_grad():
        for row in rows:
            scores = torch.log_softmax(model(torch.tensor([row.ids])).logits[0].double(), -1)
            found.append(scores[[at - 1 for at in range(1, len(row.ids)) if row.loss_mask[at]]])
    return found


def test_the_figures_are_those_of_transformers_on_the_dequantized_weights(folder, rows, tmp_path):
    files = [quant_file(folder, name) for name in ("F16", "Q8_0-F32", "Q4_0-F32", "Q8_0", "Q4_0")]
    results = measure(files, rows, [], FAST, None, "tiny", None, reference_models(folder, tmp_path))
    exact = by_transformers(folder / "F16.gguf", rows)
    targets = [[row.ids[at] for at in range(1, len(row.ids)) if row.loss_mask[at]] for row in rows]
    for result in results.quants:
        other = by_transformers(folder / f"{result.quant}.gguf", rows)
        kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(exact, other, strict=True)])
        same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in zip(exact, other, strict=True)]).double().mean().item()
        nll = -sum(scores[range(len(ids)), ids].sum().item() for scores, ids in zip(other, targets, strict=True))
        found = result.divergence
        assert found.reference == "F16" and found.tokens == len(kl) and found.rows == len(rows)
        # Files with the same kernels as the reference: what is left is that llama.cpp holds the context's keys and values in 16 bits.
        # Quants: its kernels quantize activations too, which is part of what is served, and weighs most where the weights lose least.
        exactly = not result.quant.startswith("Q") or result.quant.endswith("F32")
        assert found.mean == pytest.approx(kl.mean().item(), rel=0.01 if exactly else 0.5, abs=1e-6)
        assert found.p99 == pytest.approx(kl.quantile(0.99).item(), rel=0.05 if exactly else 0.5, abs=1e-5)
        assert found.same_top == pytest.approx(same, abs=0.02)
        assert result.perplexity.value == pytest.approx(math.exp(nll / len(kl)), rel=1e-4 if exactly else 1e-3)
    assert results.reference.quant == "F16" and results.reference.perplexity.value == results.quants[0].perplexity.value
    assert results.base.quant == "Q8_0" and results.base.divergence.mean > 10 * results.quants[-1].divergence.mean
    assert not results.flags and not (tmp_path / "temporary").exists()


def test_the_reference_is_made_only_where_a_figure_needs_it(folder, rows, tmp_path):
    wrote: list[str] = []
    asked = reference_models(folder, tmp_path, wrote)
    files = [quant_file(folder, "Q8_0")]
    first = measure(files, rows, [], FAST, None, "tiny", tmp_path / "cache", asked)
    assert wrote == ["F16", "base Q8_0"]
    again = measure(files, rows, [], FAST, None, "tiny", tmp_path / "cache", asked)
    assert wrote == ["F16", "base Q8_0"]
    assert (again.quants, again.base, again.reference) == (first.quants, first.base, first.reference)
    more = measure([*files, quant_file(folder, "Q4_0")], rows, [], FAST, None, "tiny", tmp_path / "cache", asked)
    assert wrote == ["F16", "base Q8_0", "F16"] and more.quants[1].divergence and more.quants[:1] == first.quants
    measure(files, rows, [], FAST, None, "tiny", tmp_path / "cache", dataclasses.replace(asked, reference_key="other"))
    assert wrote[3:] == ["F16", "base Q8_0"]


def test_the_unquantized_model_does_the_tasks_too_and_is_written_anew_for_them_alone(folder, rows, tmp_path):
    wrote: list[str] = []
    asked = reference_models(folder, tmp_path, wrote)
    files = [quant_file(folder, "F16")]
    tasks = [Task([{"role": "user", "content": text}], "regex", "[aeiou]", f"tasks.jsonl:{at}") for at, text in enumerate(("one", "two", "three"))]
    first = measure(files, rows, [], FAST, None, "tiny", tmp_path / "cache", asked, tasks)
    assert wrote == ["F16", "base Q8_0"]
    own = first.quants[0]
    assert (first.reference.scores, first.reference.task_answers) == (own.scores, own.task_answers) and own.scores.count == 3
    assert all((kept.value is None) == bool(kept.reason) and kept.value in (None, 1) for kept in (own.gain_kept, own.task_gain_kept))

    # A comparison of an earlier version asked it nothing.
    for unit in ("tasks", "scores"):
        (tmp_path / f"cache/reference.{unit}.json").unlink()
    assert measure(files, rows, [], FAST, None, "tiny", tmp_path / "cache", asked, tasks).reference == first.reference
    assert wrote == ["F16", "base Q8_0", "F16"]


def test_what_an_importance_matrix_gave_is_measured_on_a_file_that_is_there_for_this_only(folder, rows, tmp_path):
    """Q4_0 stands for a quant without its matrix, whose file with it is Q8_0."""
    wrote: list[str] = []

    def write_without_importance(quant: str, path: Path) -> None:
        assert quant == "Q8_0" and not list(path.parent.glob("*.gguf"))
        path.write_bytes((folder / "Q4_0.gguf").read_bytes())
        wrote.append("without")

    asked = reference_models(
        folder, tmp_path, wrote, write_base=None, write_without_importance=write_without_importance, without_importance_keys={"Q8_0": "c"}
    )
    files = [quant_file(folder, "Q8_0"), quant_file(folder, "Q4_0")]
    first = measure(files, rows, [], FAST, None, "tiny", tmp_path / "cache", asked)
    assert wrote == ["F16", "without"] and not (tmp_path / "temporary").exists()
    weighed, unweighed = first.quants
    assert weighed.divergence_without_importance == unweighed.divergence and unweighed.divergence_without_importance is None
    assert measure(files, rows, [], FAST, None, "tiny", tmp_path / "cache", asked).quants == first.quants and len(wrote) == 2

    # A comparison that was interrupted before it goes on there.
    (tmp_path / "cache/q8_0.divergence-unweighed.json").unlink()
    assert measure(files, rows, [], FAST, None, "tiny", tmp_path / "cache", asked).quants == first.quants
    assert wrote == ["F16", "without"] * 2


def test_a_quant_by_ggmls_rounding_is_measured_on_a_file_that_is_there_for_this_only(folder, rows, tmp_path):
    """Q4_0 stands for ggml's rounding of a quant whose own file is Q8_0."""
    wrote: list[str] = []

    def write_by_ggml(quant: str, path: Path) -> None:
        assert quant == "Q8_0" and not list(path.parent.glob("*.gguf"))
        path.write_bytes((folder / "Q4_0.gguf").read_bytes())
        wrote.append("by ggml")

    asked = reference_models(
        folder, tmp_path, wrote, write_base=None, write_by_ggml=write_by_ggml, ggml_keys={"Q8_0": "c"}, ggml_tasks=True, rounding="search"
    )
    files = [quant_file(folder, "Q8_0"), quant_file(folder, "Q4_0")]
    elsewhere = [dataclasses.replace(row, source=f"poems.txt:{number}") for number, row in enumerate(rows[3:6])]
    first = measure(files, rows, [], FAST, None, "tiny", tmp_path / "cache", asked, other=elsewhere)
    assert wrote == ["F16", "by ggml"] and not (tmp_path / "temporary").exists()
    (searched, ggml), found = first.quants, first.quants[0].by_ggml
    assert (found.divergence, found.perplexity, found.rounding) == (ggml.divergence, ggml.perplexity, "search") and ggml.by_ggml is None
    assert found.divergence_change.value == pytest.approx(searched.divergence.mean - ggml.divergence.mean)
    assert found.perplexity_change.value == pytest.approx(searched.perplexity.value / ggml.perplexity.value - 1)
    # Rows outside the domain have figures of their own: here they are rows that were scored anyway.
    assert first.other_text == "poems.txt" and found.other_text == ggml.other_text and found.other_text.rows == 3
    assert searched.other_text.row_kl == pytest.approx(searched.divergence.row_kl[3:6])
    assert searched.other_text.row_same_top == searched.divergence.row_same_top[3:6]
    assert found.same_top_change.value == pytest.approx(searched.divergence.same_top - ggml.divergence.same_top) and found.score_change is None
    assert measure(files, rows, [], FAST, None, "tiny", tmp_path / "cache", asked, other=elsewhere).quants == first.quants and len(wrote) == 2

    # With tasks it is written for these alone: the reference has answered them.
    tasks = [Task([{"role": "user", "content": "one"}], "regex", "[aeiou]", "tasks.jsonl:1")]
    more = measure(files, rows, [], FAST, None, "tiny", tmp_path / "cache", asked, tasks)
    assert wrote[2:] == ["F16", "by ggml"]
    again = more.quants[0].by_ggml
    assert again.scores == more.quants[1].scores and again.score_change.value == more.quants[0].scores.mean - again.scores.mean
    assert (again.perplexity, again.divergence) == (found.perplexity, found.divergence)


def test_only_whole_rows_whose_logits_fit_are_compared(rows, tmp_path):
    vocabulary = tiny_gguf.tokenizer().get_vocab_size()
    fits = sum(row.target_count for row in rows[:5])
    path = tmp_path / "logits.f32"
    with LogitsWriter(path, [row.target_count for row in rows], vocabulary, 4 * vocabulary * (fits + 1)) as writer:
        for number, row in enumerate(rows):
            for _ in range(row.target_count):
                writer.add(number, np.full(vocabulary, number))
    assert writer.rows == 5
    kept = open_logits(path, fits, vocabulary)
    assert kept[0, 0] == 0 and kept[-1, -1] == 4
    with pytest.raises(OlpackError, match="vocabulary"):
        open_logits(path, fits, vocabulary + 1)


def test_where_f16_overflows_bf16_is_the_reference(folder, rows, tmp_path):
    tokenizer = tiny_gguf.tokenizer()
    huge = tiny_gguf.model(tokenizer.get_vocab_size())
    with torch.no_grad():  # the activations of one layer pass 65504, the largest number in F16, and the next layer normalizes them
        huge.model.layers[0].mlp.up_proj.weight.mul_(1e5)
    for kind in ("F16", "BF16"):
        tiny_gguf.write(tmp_path / f"{kind}.gguf", huge, tokenizer, gguf.GGMLQuantizationType[kind])
    wrote: list[str] = []
    results = measure(
        [quant_file(tmp_path, "BF16")], rows, [], FAST, None, "tiny", None, reference_models(tmp_path, tmp_path, wrote, write_base=None)
    )
    assert wrote == ["F16", "BF16"] and results.reference.quant == "BF16" and results.base is None
    assert results.quants[0].divergence.mean == pytest.approx(0, abs=1e-9)


def test_without_room_for_the_reference_the_rest_is_measured(folder, rows, tmp_path):
    def full(quant: str, path: Path) -> None:
        path.write_bytes(b"the beginning")
        raise OlpackError("The files need 16.0 GB.", "Make room.")

    results = measure([quant_file(folder, "Q8_0")], rows, [], FAST, None, "tiny", None, reference_models(folder, tmp_path, write_reference=full))
    (flag,) = results.flags
    assert flag.code == "reference" and "16.0 GB" in flag.text and not flag.serious
    (quant,) = results.quants
    assert quant.perplexity and quant.speed and quant.divergence is None and results.recommendation
    assert not (tmp_path / "temporary").exists()


@pytest.mark.parametrize("at", ["write_reference", "write_base"])
def test_nothing_is_left_when_the_user_interrupts(folder, rows, tmp_path, at):
    def interrupted(quant: str, path: Path) -> None:
        path.write_bytes(b"the beginning")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure([quant_file(folder, "Q8_0")], rows, [], FAST, None, "tiny", None, reference_models(folder, tmp_path, **{at: interrupted}))
    assert list(tmp_path.iterdir()) == []


def test_divergence_by_hand():
    p, q = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.25, 0.5])
    assert kl_divergence(p, q) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert np.exp(log_softmax(np.array([1000.0, 0.0]))) == pytest.approx([1, 0])
    found = summarize("F16", [[0.0], [1.0, 2.0, 3.0]], [1, 1])
    # as for perplexity, S = (0, 6), T = (1, 3): deviations 0 - 1.5 and 6 - 4.5
    assert (found.mean, found.standard_error) == (1.5, pytest.approx(math.sqrt(2 * 4.5) / 4))
    assert (found.p99, found.same_top, found.tokens) == (pytest.approx(2.97), 0.5, 4)
    assert summarize("F16", [[1.0, 2.0]], [1]).p99_standard_error is None


def test_the_percentiles_standard_error_is_the_spread_of_repeated_draws():
    random = np.random.default_rng(0)
    draws = [summarize("F16", [random.exponential(random.gamma(4), size=40) for _ in range(40)], [0] * 40) for _ in range(20)]
    assert np.mean([draw.p99_standard_error for draw in draws]) == pytest.approx(np.std([draw.p99 for draw in draws]), rel=0.4)
