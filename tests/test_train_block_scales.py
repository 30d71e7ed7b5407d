"""Block scales that are trained to keep what the unquantized model predicts: gradients, files, interruptions."""

from __future__ import annotations

import ctypes
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import psutil
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export_rounded import ROWS, dequantized, read, searched, write_long_rows
from tiny_models import converter, write_model

from olpack.data import TokenRow
from olpack.errors import OlpackError
from olpack.export import Target, blocks_file
from olpack.llamacpp import library
from olpack.llamacpp.grids import GRID_TYPES, HALVES, write_halves
from olpack.model.gguf_base import open_gguf
from olpack.model.gguf_blocks import TYPES
from olpack.stages import calibration
from olpack.train import block_scales
from olpack.train.block_scales import ScaledLinear, train_block_scales
from olpack.train.frozen import BlockLinear

LENGTHS = [random.Random(index).randrange(20, 60) for index in range(24)]
TOKEN_ROWS = [TokenRow([random.Random(index).randrange(3, 40) for index in range(length)], [True] * length, "", "") for length in LENGTHS]


@pytest.mark.parametrize("name", GRID_TYPES)
def test_gradients_of_the_factors_are_those_of_the_scales(name):
    draw = np.random.default_rng(3)
    weights = (draw.standard_normal((6, 512)) * 0.02).astype(np.float32)
    weights[2] = 0
    type_ = TYPES[library.tensor_type(name)]
    exact = BlockLinear(TYPES[0], 6, 512, torch.nn.Parameter(torch.ones(6), requires_grad=False), torch.float32)
    exact._buffers["blocks"] = torch.from_numpy(weights.view(np.uint8))
    packed = searched(name, weights)
    layer = ScaledLinear(exact, type_, HALVES[name], torch.from_numpy(packed.copy()))
    x = torch.from_numpy(draw.standard_normal((2, 3, 512)).astype(np.float32)).requires_grad_()
    upstream = torch.from_numpy(draw.standard_normal((2, 3, 6)).astype(np.float32))
    layer(x).backward(upstream)

    halves = layer.halves()
    parts = []  # what each number of a block gives of the weights, by ggml's own function
    for number in range(len(halves)):
        alone = torch.zeros_like(halves)
        alone[number] = halves[number]
        blocks = packed.copy()
        write_halves(name, blocks, alone.numpy())
        parts.append(torch.from_numpy(dequantized(name, blocks, 512)))
    factors = torch.zeros_like(layer.factors, requires_grad=True)
    expanded = factors.exp().repeat_interleave(type_.weights, dim=2)
    other = x.detach().clone().requires_grad_()
    F.linear(other, sum(part * factor for part, factor in zip(parts, expanded, strict=True)), exact.bias).backward(upstream)
    torch.testing.assert_close(layer.factors.grad, factors.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, other.grad)

    with torch.no_grad():
        layer.factors.copy_(torch.from_numpy(draw.standard_normal(factors.shape).astype(np.float32) * 0.1))
    layer.write()
    write_halves(name, packed, layer.halves().numpy())
    assert np.array_equal(dequantized(name, packed, 512), layer.dequantize().numpy())
    assert not torch.equal(layer.halves(), halves)
    layer.quantized = False
    assert torch.equal(layer(x), exact(x))


@pytest.fixture(scope="module")
def rounded(tmp_path_factory) -> tuple[Path, Path, Path, dict[str, tuple[str, Path]]]:
    """(a model whose predictions rounding changes, its F32 file, the folder of its blocks in Q2_K, types and files of these)."""
    root = tmp_path_factory.mktemp("rounded")
    model, exact, folder = write_model(root / "model", "llama", tied=False, intermediate_size=256), root / "F32.gguf", root / "blocks"
    weights = load_file(model / "model.safetensors")
    save_file({name: 4 * one if one.ndim == 2 else one for name, one in weights.items()}, model / "model.safetensors", {"format": "pt"})
    converter().export(model, [Target("F32", exact)])
    made = converter().round(model, ["Q2_K", "Q4_0"], exact, ROWS, folder, rounding="learned", threads=1)
    assert set(made.few_bits) == {"Q2_K", "Q4_0"} and set(made.few_bits["Q2_K"].values()) >= {"q2_K", "q3_K"}
    return model, exact, folder, {name: (one, blocks_file(folder, name, one)) for name, one in made.few_bits["Q2_K"].items()}


def test_scales_go_into_the_file_and_nothing_else_changes(rounded, tmp_path):
    import llama_cpp

    model, exact, folder, matrices = rounded
    out = tmp_path / "scales.safetensors"
    made = train_block_scales(exact, matrices, TOKEN_ROWS, out, steps=20, title="training")
    assert made.after < 0.9 * made.before and 0 < made.steps <= 20
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    targets = [Target("Q2_K", tmp_path / f"{name}.gguf") for name in ("trained", "rounded")]
    options = {"rounding": "learned", "rounded": folder}
    converter().export(model, targets[:1], scales={"Q2_K": out}, **options)
    converter().export(model, targets[1:], **options)
    trained, before = (read(target.path) for target in targets)
    with safe_open(out, "numpy") as scales:
        assert set(scales.keys()) == set(matrices)
        for name, tensor in trained.items():
            expected = before[name].data.copy()
            if name in matrices:
                write_halves(matrices[name][0], expected, scales.get_tensor(name))
                assert not np.array_equal(expected, before[name].data)
            assert np.array_equal(tensor.data, expected), name
    params = llama_cpp.llama_model_quantize_default_params()
    params.only_copy = True
    copy = tmp_path / "copy.gguf"
    assert llama_cpp.llama_model_quantize(str(targets[0].path).encode(), str(copy).encode(), ctypes.byref(params)) == 0
    assert copy.read_bytes() == targets[0].path.read_bytes()


def test_an_interrupted_training_goes_on(rounded, tmp_path, monkeypatch):
    _, exact, _, matrices = rounded
    monkeypatch.setattr(block_scales, "_MEASURE_EVERY", 2)
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    expected = train_block_scales(exact, matrices, TOKEN_ROWS, whole, steps=6, title="training")
    take, taken = block_scales._Run.take, []

    def interrupted(run, rows):
        taken.append(run.step)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return take(run, rows)

    monkeypatch.setattr(block_scales._Run, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_block_scales(exact, matrices, TOKEN_ROWS, parts, steps=6, title="training")
    assert not parts.exists()
    assert train_block_scales(exact, matrices, TOKEN_ROWS, parts, steps=6, title="training") == expected
    assert taken == [0, 1, 2, 3, 2, 3, 4, 5]
    assert parts.read_bytes() == whole.read_bytes()


def test_training_that_gains_nothing_keeps_the_scales(rounded, tmp_path, monkeypatch):
    _, exact, _, matrices = rounded
    monkeypatch.setattr(block_scales, "_LEARNING_RATE", 3.0)
    made = train_block_scales(exact, matrices, TOKEN_ROWS, tmp_path / "scales.safetensors", steps=2, title="training")
    assert made.steps == 0 and made.after == made.before
    with safe_open(tmp_path / "scales.safetensors", "numpy") as scales:
        for name, (type_name, path) in matrices.items():
            blocks = np.fromfile(path, np.uint8).reshape(scales.get_tensor(name).shape[1], -1)
            same = blocks.copy()
            write_halves(type_name, same, scales.get_tensor(name))
            assert np.array_equal(same, blocks)


def test_a_model_that_predicts_no_numbers(rounded, tmp_path):
    _, exact, _, matrices = rounded
    content = bytearray(exact.read_bytes())
    norm = read(exact)["blk.1.attn_norm.weight"]
    content[norm.data_offset : norm.data_offset + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(OlpackError, match="are no numbers"):
        train_block_scales(tmp_path / "broken.gguf", matrices, TOKEN_ROWS, tmp_path / "scales.safetensors", steps=2, title="training")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


def test_activations_that_do_not_fit_are_computed_again(rounded, tmp_path, monkeypatch):
    _, exact, _, matrices = rounded
    found = []
    for again in (False, True):
        monkeypatch.setattr(block_scales, "check_memory", lambda *arguments, again=again: again)
        out = tmp_path / f"{again}.safetensors"
        assert train_block_scales(exact, matrices, TOKEN_ROWS, out, steps=3, title="training").steps
        found.append(out.read_bytes())
    assert found[0] == found[1]


def test_too_little_memory_is_refused_before_anything_is_loaded(rounded, tmp_path, monkeypatch):
    _, exact, _, matrices = rounded
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6, total=10**6))
    if torch.cuda.is_available():
        small = SimpleNamespace(name="a small GPU", major=9, minor=0, total_memory=10**6)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10**6, 10**6))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: small)
    monkeypatch.setattr(calibration, "this_machine", lambda: SimpleNamespace(ram=10**6))
    with pytest.raises(OlpackError, match=r"needs [\d.]+ MB of memory for both models, and 1\.0 MB are free") as error:
        train_block_scales(exact, matrices, TOKEN_ROWS, tmp_path / "scales.safetensors", steps=3, title="training")
    assert "scale_steps: 0" in error.value.remedy and not list(tmp_path.iterdir())
    base = oracle.write_base(tmp_path / "base")
    write_long_rows(tmp_path / "rows.jsonl")
    words = ("quantize", str(base), "--quant", "Q2_K", "--rounding", "learned", "--rows", "rows.jsonl", "--out", "made")
    code, _, message = oracle.olpack(tmp_path, *words)
    assert code == 1 and "--scale-steps 0" in message and "rounding matrices" not in message and not (tmp_path / "made").exists(), message


def test_a_damaged_state_is_left_alone(rounded, tmp_path):
    _, exact, _, matrices = rounded
    (tmp_path / "scales.state").write_bytes(b"PK damaged")
    made = train_block_scales(exact, matrices, TOKEN_ROWS, tmp_path / "scales.safetensors", steps=2, title="training")
    assert made is not None and [path.name for path in tmp_path.iterdir()] == ["scales.safetensors"]


def test_long_rows_are_read_up_to_their_last_target_token(rounded, tmp_path, monkeypatch):
    _, exact, _, matrices = rounded
    monkeypatch.setattr(block_scales, "LONGEST", 8)
    quant = block_scales._Quant(open_gguf(exact), matrices, torch.device("cpu"))
    ids = list(range(20))
    for targets, expected in (([12, 13], range(6, 14)), ([], range(12, 20)), ([2], range(8)), ([19], range(12, 20))):
        row = TokenRow(ids, [place in targets for place in ids], "", "")
        assert [list(window) for window in quant.windows([row])] == [list(expected)]


def test_quantize_and_build_train_them(tmp_path):
    root = oracle.make_workspace(tmp_path / "work", oracle.write_base(tmp_path / "base"))
    write_long_rows(root / "modelfiles/oracle/train.jsonl")
    rows = str(root / "modelfiles/oracle/train.jsonl")
    words = ("quantize", str(tmp_path / "base"), "--quant", "Q2_K", "--quant", "Q5_0", "--rounding", "learned", "--rows", rows)
    made = {}
    for steps in (0, 4):
        code, _, message = oracle.olpack(tmp_path, *words, "--scale-steps", str(steps), "--out", f"{steps}")
        assert code == 0 and ("trained the block scales of Q2_K" in message) == (steps > 0), message
        made[steps] = {path.name: path.read_bytes() for path in (tmp_path / f"{steps}").iterdir()}
    assert len(made[0]) == 2 and {name for name in made[0] if made[0][name] != made[4][name]} == {"base-Q2_K.gguf"}

    settings = ("--set", "train.epochs=1", "--set", "quants=[Q2_K, Q5_0, Q8_0]", "--set", "export.rounding=learned", "--set", "export.scale_steps=4")
    code, printed, message = oracle.olpack(root, "plan", "oracle", *settings)
    assert code == 0 and "the block scales of Q2_K are trained" in " ".join(printed.split()), message
    for stage in ("train", "export"):
        code, _, message = oracle.olpack(root, stage, "oracle", *settings)
        assert code == 0, message
    assert "trained the block scales of Q2_K" in message
    inputs = {quant: json.loads((root / f"build/oracle/stages/export-{quant}.json").read_text())["inputs"] for quant in ("Q2_K", "Q5_0", "Q8_0")}
    assert [one.get("export.scale_steps") for one in inputs.values()] == [4, None, None]
    assert not any("round" in name or "scales" in name for name in oracle.files(root / "build/oracle"))


def test_a_model_without_such_training_keeps_its_rounding(tmp_path, monkeypatch):
    base = oracle.write_base(tmp_path / "parrot")
    write_long_rows(tmp_path / "rows.jsonl")

    monkeypatch.setattr(block_scales, "trains", lambda architecture: False)
    words = ("quantize", str(base), "--quant", "Q2_K", "--rounding", "learned", "--rows", "rows.jsonl")
    code, _, message = oracle.olpack(tmp_path, *words, "--scale-steps", "2")
    assert code == 0 and "The block scales of Q2_K stay as they were rounded: olpack trains on no GGUF files of the architecture" in message, message
    assert (tmp_path / "parrot-Q2_K.gguf").is_file()
