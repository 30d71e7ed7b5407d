"""`rounding: learned`: matrices whose outputs on rows of data change less than with any choice of scales, in ordinary files."""

from __future__ import annotations

import ctypes
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import oracle
import pytest
import torch
from tiny_models import converter, write_adapter, write_model

from olpack.errors import OlpackError
from olpack.export import Target, rounded, run
from olpack.export.column_kernel import KernelColumns
from olpack.export.converter import SourceModel, SourceTensor
from olpack.export.plan import FilePlan
from olpack.export.rounded import gpu_memory_for_others, input_factors
from olpack.export.second_order import DAMPING, Columns, agree, factor, output_error, round_matrix
from olpack.export.size_budget import read_sensitivity
from olpack.llamacpp import library
from olpack.llamacpp.activations import input_products, input_squares
from olpack.llamacpp.grids import GRID_TYPES, read_grid, write_codes
from olpack.quants import quant_type

ROWS = [[random.Random(length).randrange(3, 512) for _ in range(length)] for length in (200, 5, 64, 130)]
QUANTS = ("Q4_K_M", "Q2_K", "Q4_0")


def searched(name: str, values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    packed = np.empty((len(values), library.row_size(library.tensor_type(name), values.shape[1])), np.uint8)
    assert library.quantize_rows(library.tensor_type(name), values, packed, weights, search=True)
    return packed


def dequantized(name: str, packed: np.ndarray, columns: int) -> np.ndarray:
    values = np.empty((len(packed), columns), np.float32)
    library.dequantize_rows(library.tensor_type(name), np.ascontiguousarray(packed), values)
    return values


@pytest.fixture(scope="module")
def layer() -> tuple[np.ndarray, np.ndarray]:
    """Weights [rows, columns], and inputs [vectors, columns] that have much in common with each other."""
    draw = np.random.default_rng(5)
    mixed = draw.standard_normal((512, 512)) * 0.1 * np.exp(draw.standard_normal((512, 1))) + np.diag(np.exp(draw.standard_normal(512) / 2))
    weights = (draw.standard_normal((96, 512)) * 0.02).astype(np.float32)
    weights[3], weights[5, :64] = 0, 0.5
    return weights, (draw.standard_normal((1500, 512)) @ mixed).astype(np.float32)


@pytest.mark.parametrize("name", GRID_TYPES)
def test_the_output_changes_less_than_with_searched_scales(layer, name):
    weights, inputs = layer
    products = torch.from_numpy(inputs.T @ inputs)
    given = factor(products, len(inputs))
    assert given is not None and given.damping == DAMPING
    with ThreadPoolExecutor(2) as pool:
        packed = round_matrix(name, weights, given, pool)
    importance = np.ascontiguousarray(np.square(inputs).mean(axis=0))
    made, other = dequantized(name, packed, 512), dequantized(name, searched(name, weights, importance), 512)
    assert np.array_equal(made, gguf.dequantize(packed, gguf.GGMLQuantizationType(library.tensor_type(name))))
    changes = [np.square((weights - one).astype(np.float64) @ inputs.T).sum() for one in (made, other)]
    assert changes[0] < 0.5 * changes[1]
    # The measure that budgets compare types by is that change, and a little of the weights' own.
    plain = DAMPING * np.square(inputs).mean(axis=0).mean() * np.square(weights - made).sum()
    assert output_error(weights, made, given) == pytest.approx(changes[0] / len(inputs) + plain, rel=1e-3)


@pytest.mark.parametrize("name", GRID_TYPES)
def test_grids_are_those_of_ggml(layer, name):
    weights, _ = layer
    packed, kind = searched(name, weights), GRID_TYPES[name]
    scales, lows = read_grid(name, packed)
    codes = np.random.default_rng(6).integers(0, len(kind.levels), weights.shape).astype(np.uint8)
    write_codes(name, packed, codes)
    levels = np.array(kind.levels, np.float32)[codes]
    expected = np.repeat(scales, kind.part, axis=1) * levels + np.repeat(lows, kind.part, axis=1)
    assert np.array_equal(dequantized(name, packed, 512), expected)


def test_singular_moments_are_damped(layer):
    weights, inputs = layer
    few = torch.from_numpy(inputs[:7].T @ inputs[:7])
    given = factor(few, 7)
    assert given is not None and given.damping == DAMPING
    with ThreadPoolExecutor(2) as pool:
        made = dequantized("q4_K", round_matrix("q4_K", weights, given, pool), 512)
    assert np.isfinite(made).all()
    wrong = few - 0.05 * few.diagonal().mean() * torch.eye(512)  # no moments have negative eigenvalues, but for errors of floating point
    assert factor(wrong, 7).damping == 0.1
    assert factor(torch.zeros(8, 8), 7) is None


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "parrot", tied=False, intermediate_size=256)


@pytest.fixture(scope="module")
def unquantized(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("unquantized") / "F32.gguf"
    converter().export(model, [Target("F32", path)])
    return path


def read(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {one.name: one for one in gguf.GGUFReader(path).tensors}


def test_products_of_inputs(unquantized):
    names = [f"blk.1.{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")]
    found = input_products(unquantized, ROWS, names, torch.device("cpu"), threads=1)
    squares = input_squares(unquantized, ROWS, threads=1)
    assert set(found) == set(names) and found[names[0]] is found[names[1]] is found[names[2]] is not found[names[3]]
    for name, products in found.items():
        assert products.count == squares[name].counts[0] == sum(map(len, ROWS))
        assert torch.equal(products.sums, products.sums.T)
        assert np.allclose(products.sums.diagonal().numpy(), squares[name].sums[0], rtol=1e-4)


def test_files_stay_ordinary_and_an_interrupted_run_goes_on(model, unquantized, tmp_path):
    import llama_cpp

    folder, options = tmp_path / "blocks", {"rounding": "learned", "threads": 1}
    with pytest.raises(OlpackError, match="rounds matrices by what they are multiplied with on rows of data"):
        converter().export(model, [Target("Q4_0", tmp_path / "Q4_0.gguf")], **options)
    with pytest.raises(OlpackError, match="are not complete"):
        converter().export(model, [Target("Q4_0", tmp_path / "Q4_0.gguf")], rounded=folder, **options)
    assert not (tmp_path / "Q4_0.gguf").exists()

    made = converter().round(model, QUANTS, unquantized, ROWS, folder, **options)
    assert made.matrices == 14 and made.unread == made.damped == []
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for lost in ("matrices.json", "blk.1.ffn_up.weight.q2_K"):  # as where the run ended before these
        (folder / lost).unlink()
    converter().round(model, QUANTS, unquantized, ROWS, folder, **options)
    assert {name for name in times if times[name] != (folder / name).stat().st_mtime_ns} == {"matrices.json", "blk.1.ffn_up.weight.q2_K"}

    targets = {rounding: [Target(quant, tmp_path / f"{rounding}-{quant}.gguf") for quant in QUANTS] for rounding in ("learned", "search")}
    converter().export(model, targets["learned"], rounded=folder, **options)
    converter().export(model, targets["search"], rounding="search")
    names = [f"blk.{layer}.{name}.weight" for layer in (0, 1) for name in ("attn_q", "attn_output", "ffn_up", "ffn_down")]
    inputs, exact = input_products(unquantized, ROWS, names, torch.device("cpu"), threads=1), read(unquantized)
    for path, other in ((pair[0].path, pair[1].path) for pair in zip(targets["learned"], targets["search"], strict=True)):
        ours, theirs = read(path), read(other)
        assert [(one.name, one.tensor_type, one.data_offset) for one in ours.values()] == [
            (one.name, one.tensor_type, one.data_offset) for one in theirs.values()
        ]
        for name in ("token_embd.weight", "output.weight"):
            assert np.array_equal(ours[name].data, theirs[name].data)
        for name in names:
            given = factor(inputs[name].sums, inputs[name].count)
            errors = [output_error(exact[name].data, gguf.dequantize(one.data, one.tensor_type), given) for one in (ours[name], theirs[name])]
            assert errors[0] < errors[1], (path.stem, name)
        params = llama_cpp.llama_model_quantize_default_params()
        params.only_copy = True
        copy = tmp_path / "copy.gguf"
        assert llama_cpp.llama_model_quantize(str(path).encode(), str(copy).encode(), ctypes.byref(params)) == 0
        assert copy.read_bytes() == path.read_bytes()


def test_experts_and_types_without_a_choice_keep_searched_scales(tmp_path):
    experts = write_model(tmp_path / "model", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, num_hidden_layers=1)
    assert any("gains nothing for Q8_0" in warning for warning in converter().check(experts, ["Q8_0", "Q4_0"], rounding="learned").warnings)
    source, folder = tmp_path / "F16.gguf", tmp_path / "blocks"
    converter().export(experts, [Target("F16", source)])
    made = converter().round(experts, ["Q4_0"], source, ROWS, folder, rounding="learned", threads=1)
    assert made.matrices == 4 and {path.name for path in folder.iterdir()} == {
        "matrices.json",
        *(f"blk.0.attn_{name}.weight.q4_0" for name in ("q", "k", "v", "output")),
    }
    paths = [tmp_path / "learned.gguf", tmp_path / "search.gguf"]
    converter().export(experts, [Target("Q4_0", paths[0])], rounding="learned", rounded=folder)
    converter().export(experts, [Target("Q4_0", paths[1])], rounding="search")
    ours, theirs = map(read, paths)
    differing = {name for name in ours if not np.array_equal(ours[name].data, theirs[name].data)}
    assert differing and all(name.startswith("blk.0.attn_") for name in differing)


def test_a_model_that_computes_no_numbers(unquantized, model, tmp_path):
    broken = tmp_path / "broken.gguf"
    content = bytearray(unquantized.read_bytes())
    norm = read(unquantized)["blk.1.attn_norm.weight"]
    content[norm.data_offset : norm.data_offset + 4] = np.float32(np.nan).tobytes()
    broken.write_bytes(content)
    with pytest.raises(OlpackError, match=r"what goes into 'blk\.1\.attn_\w+\.weight' is infinite or undefined"):
        converter().round(model, ["Q4_0"], broken, ROWS, tmp_path / "blocks", rounding="learned", threads=1)
    assert {path.name for path in (tmp_path / "blocks").iterdir()} <= {f"blk.0.{name}.weight.q4_0" for name in NAMES_OF_A_LAYER}


NAMES_OF_A_LAYER = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def test_sensitivity_is_measured_with_the_same_rounding(unquantized, tmp_path):
    masks = [[index > 5 for index in range(len(row))] for row in ROWS]
    found = {}
    for rounding in ("search", "learned"):
        path = tmp_path / f"{rounding}.json"
        assert converter().measure(unquantized, ROWS, masks, path, key="one", rounding=rounding, calibration=ROWS, threads=1)
        found[rounding] = read_sensitivity(path)
    searched_, learned = found["search"], found["learned"]
    assert learned.keys() == searched_.keys() and learned["token_embd.weight"].errors == searched_["token_embd.weight"].errors
    layers = [name for name in learned if name.startswith("blk.")]
    assert sum(learned[name].divergence for name in layers) < sum(searched_[name].divergence for name in layers)
    for name in layers:
        errors = [learned[name].errors[one] for one in ("q2_K", "q3_K", "q4_K", "q5_K", "q6_K")]
        assert errors == sorted(errors, reverse=True)


def write_long_rows(path: Path) -> None:
    """2,048 tokens and some more, in few rows."""
    turns = [[{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "forty-two " * 18}] for number in range(300, 324)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))


def test_quantize_reads_rows(tmp_path):
    base = oracle.write_base(tmp_path / "parrot")
    write_long_rows(tmp_path / "rows.jsonl")
    words = ("quantize", str(base), "--quant", "Q4_0", "--out", "made", "--rounding", "learned")
    code, _, message = oracle.olpack(tmp_path, *words)
    assert code == 1 and "Name a file of chats or texts: --rows FILE." in message
    code, _, message = oracle.olpack(tmp_path, *words, "--rows", "none.jsonl")
    assert code == 1 and "There is no 'none.jsonl'. Name a file of chats or texts: --rows FILE." in message
    code, _, message = oracle.olpack(tmp_path, *words[:-1], "search", "--rows", "rows.jsonl")
    assert code == 1 and "names rows for `--rounding learned`" in message
    oracle.write_rows(tmp_path / "few.jsonl", 3)
    code, _, message = oracle.olpack(tmp_path, *words, "--rows", "few.jsonl")
    assert code == 1 and "needs 2,048 tokens" in message and "with rows like these" in message
    assert not (tmp_path / "made").exists()
    code, _, message = oracle.olpack(tmp_path, *words, "--rows", "rows.jsonl", "--scale-steps", "0")
    assert code == 0 and "rounded 14 matrices by" in message, message
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["parrot-Q4_0.gguf"]


def test_quantize_refuses_an_export_that_would_fail_before_it_rounds(tmp_path):
    base = oracle.write_base(tmp_path / "parrot")
    write_long_rows(tmp_path / "rows.jsonl")
    words = ("--out", "made", "--rounding", "learned", "--rows", "rows.jsonl")
    code, _, message = oracle.olpack(tmp_path, "quantize", str(base), "--quant", "Q4_0", "--quant", "IQ2_XXS", *words)
    assert code == 1 and "IQ2_XXS" in message and "rounding matrices" not in message
    assert not (tmp_path / "made").exists()


def test_quantize_rounds_an_adapter_on_a_gguf_by_the_inputs_of_both(tmp_path):
    base = oracle.write_base(tmp_path / "parrot")
    write_adapter(tmp_path / "adapter", base)
    write_long_rows(tmp_path / "rows.jsonl")
    converter().export(base, [Target("F32", tmp_path / "parrot.gguf")])
    found = []
    for source in ("parrot", "parrot.gguf"):
        words = ("--adapter", "adapter", "--rounding", "learned", "--rows", "rows.jsonl", "--scale-steps", "0", "--out", f"made-{source}")
        code, _, message = oracle.olpack(tmp_path, "quantize", source, "--quant", "Q4_0", *words)
        assert code == 0, message
        found.append(read(tmp_path / f"made-{source}" / "parrot-Q4_0.gguf"))
    for name, tensor in found[0].items():
        assert np.array_equal(tensor.data, found[1][name].data), name


def test_a_check_counts_the_blocks_beside_the_files(monkeypatch, tmp_path):
    name, counted = "blk.0.attn_q.weight", []
    model = SourceModel("llama", {name: SourceTensor(name, name, (64, 256), "F32", 4 * 64 * 256, None)}, {})
    plan = FilePlan(quant_type("Q4_0"), b"", [(name, library.tensor_type("q4_0"), 64 * 144)], [])
    monkeypatch.setattr(run, "_prepare", lambda *arguments: (model, [plan], {}, [], []))
    monkeypatch.setattr(run, "check_space", lambda paths, sizes: counted.append(dict(zip(paths, sizes, strict=True))))
    options = {"rounding": "learned", "rounded": str(tmp_path / "rounded"), "scales": "later"}
    for _ in range(2):
        run.check("model", ["Q4_0"], str(tmp_path), [], options, lambda done, total: None)
        (tmp_path / "rounded" / "of this model").mkdir(parents=True, exist_ok=True)
        (tmp_path / "rounded" / "of this model" / "a matrix").write_bytes(bytes(44))  # an interrupted run
    needed = 64 * 144 + 64 * 8 * 28  # blocks, and what the training of their 8 scales a row needs
    assert [sizes[tmp_path / "rounded" / "blocks"] for sizes in counted] == [needed, needed - 44]
    assert all(sizes[tmp_path / "Q4_0"] == plan.size for sizes in counted)


def test_a_build(tmp_path):
    root = oracle.make_workspace(tmp_path / "work", oracle.write_base(tmp_path / "base"))
    words = ("--set", "train.epochs=1", "--set", "quants=[Q4_0, F16]", "--set", "export.scale_steps=0", "--set", "export.rounding=learned")
    code, _, message = oracle.olpack(root, "plan", "oracle", *words)
    assert code == 1 and "needs 2,048 tokens of training rows" in message
    write_long_rows(root / "modelfiles/oracle/train.jsonl")
    code, printed, message = oracle.olpack(root, "plan", "oracle", *words)
    assert code == 0 and "learned: so that the outputs of each matrix on training rows change least" in printed, message
    code, _, message = oracle.olpack(root, "plan", "oracle", *words, "--quant", "Q4_0")
    assert code == 0 and "gains nothing" not in message, message  # for the Q8_0 that is there for a while
    for stage in ("train", "export"):
        code, _, message = oracle.olpack(root, stage, "oracle", *words)
        assert code == 0, message
    made = oracle.files(root / "build/oracle")
    assert {"gguf/oracle-Q4_0.gguf", "gguf/oracle-F16.gguf"} <= set(made) and not any("round" in name for name in made)
    inputs = {quant: json.loads((root / f"build/oracle/stages/export-{quant}.json").read_text())["inputs"] for quant in ("Q4_0", "F16")}
    assert inputs["Q4_0"]["export.rounding"] == "learned" and "export.rounding" not in inputs["F16"]
    code, _, message = oracle.olpack(root, "export", "oracle", *words)
    assert code == 0 and oracle.files(root / "build/oracle") == made
    for left in ("rounding-source.gguf", "rounded/blocks"):  # of a run that was killed before the recipe had ggml's rounding
        path = root / "build/oracle" / left
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"left")
    code, _, message = oracle.olpack(root, "export", "oracle", *words[:-1], "export.rounding=ggml")
    assert code == 0 and not any("round" in name for name in oracle.files(root / "build/oracle")), message


@pytest.mark.parametrize("name", ["q4_0", "iq4_nl", "q3_K", "q4_K"])  # in blocks of 32 and of 256, with uneven levels, in parts of 16 and of 32
def test_the_kernel_rounds_columns_as_plain_torch_does(name):
    device, kind = torch.device("cuda" if torch.cuda.is_available() else "cpu"), GRID_TYPES[name]
    plain, kernel = Columns(kind, device), KernelColumns(kind, device)
    assert agree(plain, kernel, kind, device)

    def other(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, errors = plain(*tensors)
        codes[-1, -1] ^= 1
        return codes, errors

    assert not agree(plain, other, kind, device)


def test_too_little_memory_of_a_gpu_is_one_sentence():
    with pytest.raises(OlpackError, match="ran out of the GPU's memory") as error, gpu_memory_for_others():
        raise torch.OutOfMemoryError
    assert "CUDA_VISIBLE_DEVICES=" in error.value.remedy


def test_what_a_gpu_cannot_read_is_read_by_llama_cpp(unquantized, monkeypatch, capsys):
    class Model:
        def products(self, rows, names, advance):
            advance(len(rows[0]))
            raise torch.OutOfMemoryError("too little")

    name = "blk.0.ffn_down.weight"
    shapes = {name: tuple(int(size) for size in reversed(read(unquantized)[name].shape))}
    expected = [(names, given.feedback) for names, given in input_factors(unquantized, ROWS, shapes, threads=1)]
    monkeypatch.setattr(rounded, "_on_gpu", lambda *_: Model())
    monkeypatch.setattr(rounded._Memory, "available", classmethod(lambda cls, layers: cls(SimpleNamespace(type="cuda"), 1 << 40, 0)))
    monkeypatch.setattr(rounded, "input_products", lambda *given, **more: input_products(*given[:3], torch.device("cpu"), **more))
    done: list[int] = []
    found = [(names, given.feedback) for names, given in input_factors(unquantized, ROWS, shapes, threads=1, advance=done.append)]
    assert [names for names, _ in found] == [[name]] and torch.equal(found[0][1], expected[0][1])
    assert sum(done) == np.prod(shapes[name]) and "llama.cpp reads the rows" in capsys.readouterr().err
