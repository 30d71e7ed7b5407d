"""A budget: the types are the best that fit, what they lose is measured on the model itself, and the file is llama.cpp's."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from oracle import files, make_workspace, olpack, write_base
from tiny_models import converter, write_model
from usual_way import quantize

from olpack.deploy.client import OllamaClient
from olpack.errors import OlpackError
from olpack.export import Target
from olpack.export.size_budget import MatrixLoss, choose, read_sensitivity, solve_knapsack
from olpack.llamacpp.engine import Engine
from olpack.llamacpp.graph import LoadedWeights
from olpack.quants import Budget, quant_type

ROWS = [[random.Random(length).randrange(3, 512) for _ in range(length)] for length in (40, 25)]
LEARNED = [[index > 5 for index in range(len(row))] for row in ROWS]


def test_a_budget_is_a_quant_with_a_name_and_a_tag():
    named = quant_type("4.6 bpw")
    assert (named.name, named.tag, named.budget) == ("4.6BPW", "4.6bpw", Budget(bits_per_weight=4.6))
    assert quant_type(named.name) == quant_type(named.tag) == named
    sized = quant_type("5 GB")
    assert (sized.name, sized.tag, sized.budget) == ("5GB", "5gb", Budget(size=5 * 10**9))
    for wrong in ("0bpw", "bpw", "-1GB", "4.6"):
        with pytest.raises(OlpackError, match="no quant type"):
            quant_type(wrong)


def test_the_choice_is_the_best_there_is():
    draw = random.Random(1)
    for _ in range(200):
        sizes = [[draw.randint(1, 30) * draw.choice([1, 4]) for _ in range(draw.randint(1, 5))] for _ in range(draw.randint(1, 5))]
        losses = [[draw.random() for _ in options] for options in sizes]
        limit = draw.randint(1, 200)
        every = [list(zip(*choice, strict=True)) for choice in itertools.product(*map(zip, sizes, losses))]
        best = min((sum(lost) for taken, lost in every if sum(taken) <= limit), default=None)
        chosen = solve_knapsack(sizes, losses, limit)
        assert (chosen is None) == (best is None)
        if chosen is not None:
            assert sum(options[index] for options, index in zip(sizes, chosen, strict=True)) <= limit
            assert sum(lost[index] for lost, index in zip(losses, chosen, strict=True)) == pytest.approx(best)


def test_large_sizes_are_rounded_without_breaking_the_limit():
    draw = random.Random(2)
    bits = (2, 3, 4, 5, 6, 8)
    sizes = [[each * weights // 8 for each in bits] for weights in (draw.randrange(10**6, 10**7) for _ in range(50))]
    losses = [[sensitivity * 4.0**-each for each in bits] for sensitivity in (draw.random() for _ in sizes)]
    limit = sum(options[2] for options in sizes)
    chosen = solve_knapsack(sizes, losses, limit)
    assert 0.999 * limit < sum(options[index] for options, index in zip(sizes, chosen, strict=True)) <= limit


def test_bits_go_where_they_count():
    errors = {"q2_K": 3.4, "q3_K": 1.0, "q4_K": 0.24, "q5_K": 0.06, "q6_K": 0.014, "q8_0": 0.001}
    losses = {
        "deaf": MatrixLoss(1e-5, "q3_K", errors),
        "keen": MatrixLoss(1e-2, "q3_K", errors),
        "zero": MatrixLoss(0, "q3_K", dict.fromkeys(errors, 0)),
    }
    shapes = dict.fromkeys(losses, (64, 256))
    chosen = choose(shapes, losses, 3 * 64 * 144, with_importance=False, alignment=32)
    assert chosen["zero"] == "q2_K" and errors[chosen["keen"]] < errors[chosen["deaf"]]
    with pytest.raises(ValueError) as error:
        choose(shapes, losses, 3 * 64 * 84 - 1, with_importance=False, alignment=32)
    assert error.value.args == (3 * 64 * 84,)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Rows of 256 and of 320 weights: the latter take no K-quant."""
    return write_model(tmp_path_factory.mktemp("models") / "model", "qwen3", intermediate_size=320)


@pytest.fixture(scope="module")
def unquantized(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("unquantized") / "F16.gguf"
    converter().export(model, [Target("F16", path)])
    return path


@pytest.fixture(scope="module")
def importance(unquantized, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("importance") / "matrix.gguf"
    converter().collect(unquantized, ROWS, path, dataset="rows", threads=1)
    return path


@pytest.fixture(scope="module")
def sensitivity(unquantized, importance, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sensitivity") / "sensitivity.json"
    assert converter().measure(unquantized, ROWS, LEARNED, path, key="one", importance=importance, threads=1)
    return path


def logits(engine: Engine) -> np.ndarray:
    return np.stack([found for _, found in engine.scored(ROWS[0], LEARNED[0])])


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.ffn_down.weight"])
def test_overwritten_weights_are_those_of_a_fresh_load(unquantized, tmp_path, name):
    (tensor,) = [tensor for tensor in gguf.GGUFReader(unquantized).tensors if tensor.name == name]
    original = np.array(tensor.data)
    changed = (original.astype(np.float32) * 1.1).astype(np.float16)
    path = tmp_path / "changed.gguf"
    content = bytearray(unquantized.read_bytes())
    content[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = changed.tobytes()
    path.write_bytes(content)
    with Engine(path, 64, threads=1) as fresh:
        expected = logits(fresh)
    where = LoadedWeights()
    with Engine(unquantized, 64, threads=1, watch=where, writable=True) as engine:
        untouched = logits(engine)
        where.check()
        where.write(name, changed)
        assert np.array_equal(logits(engine), expected) and not np.array_equal(expected, untouched)
        where.write(name, original)
        assert np.array_equal(logits(engine), untouched)


def test_every_matrix_is_measured_and_what_was_measured_is_kept(unquantized, importance, sensitivity, tmp_path):
    found = read_sensitivity(sensitivity)
    assert len(found) == 15 and all(loss.divergence > 0 for loss in found.values())
    assert found["blk.0.ffn_up.weight"].probe == "q3_K" and found["blk.0.ffn_down.weight"].probe == "q4_0"
    assert "iq4_xs" in found["blk.0.ffn_up.weight"].errors and "iq4_xs" not in found["token_embd.weight"].errors
    for loss in found.values():
        assert loss.loss("q8_0") < loss.loss("q5_K" if "q5_K" in loss.errors else "q5_0") < loss.loss(loss.probe)
        assert loss.loss(loss.probe) == pytest.approx(loss.divergence)

    record = json.loads(sensitivity.read_text())
    again = tmp_path / "again.json"
    kept = dict(list(record["matrices"].items())[:14]) | {"token_embd.weight": dict(record["matrices"]["token_embd.weight"], divergence=7.0)}
    again.write_text(json.dumps({"key": "one", "matrices": kept}))
    assert converter().measure(unquantized, ROWS, LEARNED, again, key="one", importance=importance, threads=1)
    assert read_sensitivity(again) == found | {"token_embd.weight": MatrixLoss(**kept["token_embd.weight"])}
    assert converter().measure(unquantized, ROWS, LEARNED, again, key="two", importance=importance, threads=1)
    assert read_sensitivity(again) == found


@pytest.mark.parametrize("budget", ["5bpw", "700kB", "9bpw"])
def test_the_file_is_llama_cpps_with_these_types(model, importance, sensitivity, tmp_path, budget):
    user = {"attn_v": "q6_K"}
    (file,) = converter().export(model, [Target(budget, tmp_path / "out.gguf")], importance=importance, sensitivity=sensitivity, tensor_types=user)
    wanted = quant_type(budget)
    assert file.quant == wanted.name
    if wanted.budget.size:
        assert 0.98 * wanted.budget.size < file.size == file.path.stat().st_size <= wanted.budget.size
    elif budget == "5bpw":
        assert 4.9 < file.bits_per_weight <= 5
    reader = gguf.GGUFReader(file.path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors if tensor.tensor_type.name != "F32"}
    assert {types[f"blk.{layer}.attn_v.weight"] for layer in (0, 1)} == {"Q6_K"}
    assert sum(sum(counts.values()) for counts in file.types.values()) == len(types) and file.types["attn_v"] == {"q6_K": 2}
    assert not file.needs_importance
    if budget == "9bpw":  # more than there is to spend
        assert set(types.values()) == {"Q6_K", "Q8_0"}
    mix = next(
        name
        for name in ("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q8_0", "Q3_K_M", "Q3_K_L", "Q5_K_M", "Q6_K")
        if quant_type(name).ftype == reader.fields["general.file_type"].contents()
    )
    assert mix == "Q8_0" or budget != "9bpw"
    converter().export(model, [Target("BF16", tmp_path / "BF16.gguf")])
    quantize(tmp_path / "BF16.gguf", tmp_path / "usual.gguf", mix, importance, {f"^{re.escape(name)}$": type_ for name, type_ in types.items()})
    assert file.path.read_bytes() == (tmp_path / "usual.gguf").read_bytes()


def test_a_budget_that_is_too_small_names_the_smallest(model, importance, sensitivity, tmp_path):
    for budget, unit in (("2bpw", "bpw"), ("1kB", "MB")):
        with pytest.raises(OlpackError, match=rf"a file of {budget.lower()} .* The smallest that is possible is [0-9.]+{unit}\.$") as error:
            converter().check(model, [budget], importance=importance)
        smallest = error.value.remedy.split()[-1].rstrip(".")
        (file,) = converter().export(model, [Target(smallest, tmp_path / "out.gguf")], importance=importance, sensitivity=sensitivity)
        assert file.size == pytest.approx(converter().check(model, [smallest], importance=importance).sizes[file.quant], abs=2048)


def test_a_budget_without_measured_losses_is_refused(model, tmp_path):
    with pytest.raises(OlpackError, match="is a budget: .* `olpack build` measures"):
        converter().export(model, [Target("5bpw", tmp_path / "out.gguf")])
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(OlpackError, match="contains no measured sensitivity"):
        converter().export(model, [Target("5bpw", tmp_path / "out.gguf")], sensitivity=tmp_path / "broken.json")
    assert not (tmp_path / "out.gguf").exists()


def test_a_build_with_a_budget(tmp_path, ollama_double):
    root = make_workspace(tmp_path / "work", write_base(tmp_path / "base"))
    build, words = root / "build/oracle", ("build", "oracle", "--json", "--set", "train.epochs=1", "--set", "compare.reference=false")
    code, printed, message = olpack(root, "plan", "oracle", "--json", "--set", "quants=[{budget: 5 bpw}]")
    estimate = json.loads(printed)["estimate"]
    assert code == 0 and set(estimate["disk_bytes"]) == {"5BPW"} and estimate["sensitivity_bytes"] > 2 * estimate["parameters"]

    code, printed, message = olpack(root, *words, "--set", "quants=[{budget: 5 bpw}]", server=ollama_double.url)
    assert code == 0, message
    made = files(build)
    assert {"gguf/oracle-5BPW.gguf", "modelfiles/5bpw.Modelfile", "sensitivity.json", "stages/sensitivity.json"} <= set(made)
    assert "sensitivity-source.gguf" not in made
    (compared,) = json.loads((build / "compare/results.json").read_text())["quants"]
    assert compared["tag"] == "5bpw" and sum(compared["types"]["attn_v"].values()) == 2
    assert "Types that the budgets chose" in (build / "compare/report.html").read_text()
    assert {tag.model for tag in OllamaClient(ollama_double.url).tags()} == {"oracle:5bpw", "oracle:latest"}

    # Another budget costs no new measurement, and the first file stays.
    code, _, message = olpack(root, "export", "oracle", "--set", "train.epochs=1", "--set", "quants=[{budget: 5 bpw}, {size: 700 kB}]")
    assert code == 0, message
    after = files(build)
    assert {name for name in after if after[name] != made.get(name)} == {"gguf/oracle-700KB.gguf", "stages/export-700KB.json", "plan.json"}
    assert (build / "gguf/oracle-700KB.gguf").stat().st_size <= 700_000
