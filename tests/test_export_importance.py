"""The importance matrix is the model's own, llama.cpp takes it, and what is quantized with it is what llama.cpp makes of it."""

from __future__ import annotations

import ctypes
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from tiny_models import converter, write_model
from usual_way import quantize

from olpack.errors import OlpackError
from olpack.export import Target
from olpack.export.client import Converter
from olpack.export.importance import ImportanceMatrix, read_importance, write_importance
from olpack.llamacpp.activations import InputSquares, input_squares
from olpack.llamacpp.library import ggml

QUANTS = ["IQ2_XS", "IQ3_XXS", "Q2_K", "Q4_K_M"]  # ggml searches for the codebooks of IQ1 for half a minute, in each process
MODELS = {
    "qwen3-tied": ("qwen3", {"tied": True, "intermediate_size": 256}),
    # Eight layers: llama.cpp treats the first of so many otherwise where there is a matrix.
    "llama-deep": ("llama", {"tied": False, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 8}),
    "qwen3-experts": ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "num_hidden_layers": 1}),
}
ROWS = [[random.Random(length).randrange(3, 512) for _ in range(length)] for length in (200, 5, 1, 64, 130)]
TOKENS = sum(len(row) for row in ROWS)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, kind, **settings) for name, (kind, settings) in MODELS.items()}


@pytest.fixture(scope="module")
def unquantized(models, tmp_path_factory) -> dict[str, dict[str, Path]]:
    """The models as GGUFs in F32 and BF16."""
    root = tmp_path_factory.mktemp("unquantized")
    made = {}
    for name, source in models.items():
        files = converter().export(source, [Target(quant, root / f"{name}-{quant}.gguf") for quant in ("F32", "BF16")])
        made[name] = {file.quant: file.path for file in files}
    return made


@pytest.fixture(scope="module")
def matrices(unquantized, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("matrices")
    for name, files in unquantized.items():
        converter().collect(files["F32"], ROWS, root / f"{name}.gguf", dataset="some/rows.jsonl", threads=1)
    return {name: root / f"{name}.gguf" for name in unquantized}


@pytest.fixture
def exact_attention(monkeypatch):
    """Attention in float32: llama.cpp's default keeps keys and values, and adds up, in half precision."""
    import llama_cpp

    defaults = llama_cpp.llama_context_default_params

    def in_float32():
        params = defaults()
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
        return params

    monkeypatch.setattr(llama_cpp, "llama_context_default_params", in_float32)


def squares_in_transformers(source: Path) -> dict[str, np.ndarray]:
    """What the sums should be, by the tensor's name in the GGUF: [matrices, columns], from the modules' inputs in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    names = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    sums: dict[str, np.ndarray] = {}

    def add(name: str, value: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0) + value.double().numpy()

    def linear(module, given, result, name):
        _, _, layer, *_, last = name.split(".")
        add(f"blk.{layer}.{names[last]}.weight", given[0].reshape(-1, given[0].shape[-1]).square().sum(0)[None])

    def routed(module, given, result, name):
        layer, (hidden,), (_, _, chosen) = name.split(".")[2], given, result
        add(f"blk.{layer}.ffn_gate_inp.weight", hidden.square().sum(0)[None])
        experts = model.model.layers[int(layer)].mlp.experts
        for expert in range(experts.num_experts):
            mine = hidden[(chosen == expert).any(-1)]
            gate, up = (mine @ experts.gate_up_proj[expert].T).chunk(2, -1)
            for tensor, value in (("gate", mine), ("up", mine), ("down", torch.nn.functional.silu(gate) * up)):
                whole = torch.zeros(experts.num_experts, value.shape[-1])
                whole[expert] = value.square().sum(0)
                add(f"blk.{layer}.ffn_{tensor}_exps.weight", whole)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda *call, name=name: linear(*call, name))
        elif name.endswith("mlp.gate"):
            module.register_forward_hook(lambda *call, name=name: routed(*call, name))
    with torch.inference_mode():
        for row in ROWS:
            model(torch.tensor([row]))
    return sums


@pytest.mark.parametrize("name", MODELS)
def test_the_sums_are_those_of_the_model_in_transformers(name, models, unquantized, exact_attention):
    found, expected = input_squares(unquantized[name]["F32"], ROWS, threads=1), squares_in_transformers(models[name])
    assert found.keys() == expected.keys()
    for tensor, squares in found.items():
        np.testing.assert_allclose(squares.sums, expected[tensor], rtol=1e-3, atol=1e-6 * expected[tensor].max(), err_msg=tensor)
        assert squares.counts.sum() == TOKENS * (2 if "_exps" in tensor else 1)


def test_half_precision_attention_changes_little(unquantized, exact_attention, matrices):
    exactly, found = input_squares(unquantized["qwen3-tied"]["F32"], ROWS, threads=1), read_importance(matrices["qwen3-tied"])
    assert (found.datasets, found.chunk_size, found.chunk_count) == (["some/rows.jsonl"], 512, 1)
    for tensor, squares in found.tensors.items():
        np.testing.assert_allclose(squares.sums, exactly[tensor].sums, rtol=0.03, err_msg=tensor)


def test_what_is_written_is_read_back(tmp_path):
    tensors = {
        "blk.0.ffn_up_exps.weight": InputSquares(np.arange(12, dtype=np.float32).reshape(3, 4), np.array([7, 0, 2])),
        "blk.0.attn_q.weight": InputSquares(np.array([[1, 2, 4]], np.float32), np.array([4])),
    }
    write_importance(ImportanceMatrix(tensors, ["a.txt", "b.txt"], 3, 512), tmp_path / "matrix.gguf")
    read = read_importance(tmp_path / "matrix.gguf")
    assert (read.datasets, read.chunk_count, read.chunk_size) == (["a.txt", "b.txt"], 3, 512)
    assert list(read.tensors) == sorted(tensors)
    for name, squares in tensors.items():
        assert np.array_equal(read.tensors[name].sums, squares.sums) and np.array_equal(read.tensors[name].counts, squares.counts)
    assert read.weights("blk.0.attn_q.weight", 1).tolist() == [[0.25, 0.5, 1]]
    assert read.weights("blk.0.ffn_up_exps.weight", 3)[1:].tolist() == [[1, 1, 1, 1], [4, 4.5, 5, 5.5]]


def write_with_ggml(path: Path, matrix: ImportanceMatrix) -> None:
    """A matrix as tools/imatrix/imatrix.cpp writes it, through the same functions."""
    library, pointer, text, size = ggml(), ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t

    class Room(ctypes.Structure):  # ggml_init_params
        _fields_ = [("size", size), ("buffer", pointer), ("no_alloc", ctypes.c_bool)]

    def call(name: str, result: type | None, *arguments: object) -> object:
        function = library[name]  # not the one with olpack's signature
        function.restype = result
        return function(*arguments)

    file, room = pointer(call("gguf_init_empty", pointer)), pointer(call("ggml_init", pointer, Room(1 << 20, None, False)))
    call("gguf_set_val_str", None, file, b"general.type", b"imatrix")
    names = (text * len(matrix.datasets))(*(name.encode() for name in matrix.datasets))
    call("gguf_set_arr_str", None, file, b"imatrix.datasets", names, size(len(names)))
    call("gguf_set_val_u32", None, file, b"imatrix.chunk_count", matrix.chunk_count)
    call("gguf_set_val_u32", None, file, b"imatrix.chunk_size", matrix.chunk_size)
    for name, squares in sorted(matrix.tensors.items()):
        for part, array in (("in_sum2", squares.sums), ("counts", squares.counts[:, None])):
            rows, columns = array.shape
            tensor = pointer(call("ggml_new_tensor_2d", pointer, room, 0, ctypes.c_int64(columns), ctypes.c_int64(rows)))
            call("ggml_set_name", pointer, tensor, f"{name}.{part}".encode())
            (ctypes.c_float * array.size).from_address(call("ggml_get_data", pointer, tensor))[:] = array.reshape(-1).tolist()
            call("gguf_add_tensor", None, file, tensor)
    assert call("gguf_write_to_file", ctypes.c_bool, file, bytes(path), False)


def test_the_file_is_the_one_that_llama_imatrix_writes(matrices, tmp_path):
    for name, ours in matrices.items():
        write_with_ggml(tmp_path / "theirs.gguf", read_importance(ours))
        assert ours.read_bytes() == (tmp_path / "theirs.gguf").read_bytes(), name


@pytest.mark.parametrize(
    ("name", "quants"),
    [
        ("qwen3-tied", QUANTS),
        ("llama-deep", ["Q4_0", "Q5_0", "IQ4_XS", "IQ4_NL"]),
        ("qwen3-experts", ["Q2_K", "Q4_0", "IQ3_XXS"]),
    ],
)
def test_the_bytes_are_those_of_llama_cpp_with_the_same_matrix(name, quants, models, unquantized, matrices, tmp_path):
    plan = converter().check(models[name], quants, importance=matrices[name])
    files = converter().export(models[name], [Target(quant, tmp_path / f"{quant}.gguf") for quant in quants], importance=matrices[name])
    for file in files:
        quantize(unquantized[name]["BF16"], tmp_path / "usual.gguf", file.quant, matrices[name])
        assert file.path.read_bytes() == (tmp_path / "usual.gguf").read_bytes(), file.quant
        assert file.size == plan.sizes[file.quant]
    assert [file.needs_importance for file in files] == [is_refused_without(models[name], quant) for quant in quants]


def is_refused_without(model: Path, quant: str) -> bool:
    try:
        converter().check(model, [quant])
    except OlpackError as error:
        assert error.problem == f"{quant} needs an importance matrix."
        return True
    return False


def test_a_file_that_gains_nothing_is_the_same_without(models, matrices, tmp_path):
    targets = [Target(quant, tmp_path / f"{quant}.gguf") for quant in ("Q8_0", "Q4_0")]
    with_matrix = converter().export(models["qwen3-tied"], targets, importance=matrices["qwen3-tied"])
    without = converter().export(models["qwen3-tied"], targets)
    assert [one.sha256 == other.sha256 for one, other in zip(with_matrix, without, strict=True)] == [True, False]


def test_a_matrix_that_is_still_to_be_collected_gives_the_same_types(models, matrices):
    quants = ["IQ1_M", *QUANTS]
    later = converter().check(models["qwen3-tied"], quants, importance="later").sizes
    there = converter().check(models["qwen3-tied"], quants, importance=matrices["qwen3-tied"]).sizes
    assert all(0 <= there[quant] - later[quant] < 300 for quant in quants)  # the keys that name the matrix


def test_types_for_single_tensors_are_those_of_llama_cpp(models, unquantized, matrices, tmp_path):
    types = {r"blk\.1\.ffn_(up|gate)": "q3_K", "ffn": "IQ4_XS", "attn_[qk]": "q6_k", "token_embd": "q8_0"}
    targets = [Target(quant, tmp_path / f"{quant}.gguf") for quant in ("Q4_0", "Q8_0")]
    for file in converter().export(models["qwen3-tied"], targets, importance=matrices["qwen3-tied"], tensor_types=types):
        quantize(unquantized["qwen3-tied"]["BF16"], tmp_path / "usual.gguf", file.quant, matrices["qwen3-tied"], types)
        assert file.path.read_bytes() == (tmp_path / "usual.gguf").read_bytes(), file.quant
    import gguf

    written = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "Q4_0.gguf").tensors}
    assert [written[f"{name}.weight"] for name in ("blk.0.ffn_up", "blk.1.ffn_up", "blk.1.attn_q", "blk.1.attn_v", "token_embd")] == [
        "IQ4_XS",
        "Q3_K",
        "Q6_K",
        "Q4_0",
        "Q8_0",
    ]


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"atn_v": "q6_K"}, "has no tensor named like 'atn_v'"),
        ({"attn_norm": "q6_K"}, "quantizes no tensor named like 'attn_norm'"),
        ({"attn_v": "q6k"}, "no tensor type 'q6k'. Did you mean q6_K?"),
        ({"attn_v": "q8_K"}, "no tensor type 'q8_K'"),
        ({"attn_(v": "q6_K"}, "is no regular expression"),
        ({"(?i)attn_V": "q6_K"}, "a regular expression that C++ does not know"),
        ({"ffn_up": "iq2_xs"}, "Q4_0 needs an importance matrix"),
    ],
)
def test_types_that_cannot_be_given_are_refused(models, types, message):
    with pytest.raises(OlpackError, match=re.escape(message)) as error:
        converter().check(models["qwen3-tied"], ["Q4_0"], tensor_types=types)
    assert error.value.remedy


def changed(matrix: Path, out: Path, change) -> Path:
    read = read_importance(matrix)
    change(read.tensors)
    write_importance(read, out)
    return out


def undefine(tensors: dict[str, InputSquares]) -> None:
    tensors["blk.0.ffn_up.weight"].sums[0, 3] = np.nan


def negate(tensors: dict[str, InputSquares]) -> None:
    tensors["blk.0.ffn_up.weight"].sums[0, 3] = -1


def forget(tensors: dict[str, InputSquares]) -> None:
    del tensors["blk.1.ffn_up.weight"]


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (lambda own, other, out: out, "There is no importance matrix"),
        (lambda own, other, out: out.write_text("blk") and out, "is no importance matrix in llama.cpp's GGUF form"),
        (lambda own, other, out: changed(own, out, lambda tensors: tensors.clear()), "has none of this one's tensors"),
        (lambda own, other, out: other, "is for another model: it has 96 values for 'blk.0.attn_k.weight'"),
        (lambda own, other, out: changed(own, out, undefine), "an infinite or undefined value for 'blk.0.ffn_up.weight'"),
        (lambda own, other, out: changed(own, out, negate), "is damaged at 'blk.0.ffn_up.weight'"),
        (
            lambda own, other, out: changed(own, out, forget),
            "IQ2_XS needs the importance of every tensor, and the matrix lacks 'blk.1.ffn_up.weight'",
        ),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused_before_any_work(models, matrices, tmp_path, matrix, message):
    path = matrix(matrices["qwen3-tied"], matrices["llama-deep"], tmp_path / "changed.gguf")
    with pytest.raises(OlpackError, match=re.escape(message)) as error:
        converter().export(models["qwen3-tied"], [Target("IQ2_XS", tmp_path / "out.gguf")], importance=path)
    assert error.value.remedy
    assert not (tmp_path / "out.gguf").exists()


def test_a_model_is_no_matrix(models, unquantized):
    with pytest.raises(OlpackError, match="is no importance matrix"):
        converter().check(models["qwen3-tied"], ["Q4_0"], importance=unquantized["qwen3-tied"]["BF16"])


def test_tensors_without_importance_are_quantized_as_llama_cpp_does(models, unquantized, matrices, tmp_path):
    partial = changed(matrices["qwen3-tied"], tmp_path / "partial.gguf", forget)
    assert "The importance matrix lacks blk.1.ffn_up.weight" in converter().check(models["qwen3-tied"], ["Q4_K_M"], importance=partial).warnings[0]
    (file,) = converter().export(models["qwen3-tied"], [Target("Q4_K_M", tmp_path / "out.gguf")], importance=partial)
    quantize(unquantized["qwen3-tied"]["BF16"], tmp_path / "usual.gguf", "Q4_K_M", partial)
    assert file.path.read_bytes() == (tmp_path / "usual.gguf").read_bytes()


@pytest.mark.parametrize(("rows", "message"), [([], "There is no text"), ([[5, 9999]], "llama.cpp stopped with code")])
def test_rows_that_cannot_be_read_leave_nothing(unquantized, tmp_path, rows, message):
    with pytest.raises(OlpackError, match=message):
        converter().collect(unquantized["qwen3-tied"]["F32"], rows, tmp_path / "matrix.gguf", dataset="rows")
    assert list(tmp_path.iterdir()) == []


def test_experts_that_no_token_is_sent_to_are_told(unquantized, tmp_path, capfd):
    converter().collect(unquantized["qwen3-experts"]["F32"], [[7]], tmp_path / "matrix.gguf", dataset="rows")
    assert "18 of 24 experts' matrices got no token" in capfd.readouterr().err


def test_experts_without_importance_data_are_quantized(tmp_path, capfd):
    """ggml-org/llama.cpp#6552: 24 of 64 experts are never chosen, and IQ2_XXS cannot do without importance."""
    source = write_model(tmp_path / "model", "qwen3_moe", num_experts=64, num_experts_per_tok=1, moe_intermediate_size=256, num_hidden_layers=1)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.gate.weight"][40:] = 0  # the best of 40 random gates is above that
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    (plain,) = converter().export(source, [Target("F32", tmp_path / "plain.gguf")])
    converter().collect(plain.path, ROWS, tmp_path / "matrix.gguf", dataset="rows", threads=1)
    counts = read_importance(tmp_path / "matrix.gguf").tensors["blk.0.ffn_up_exps.weight"].counts
    assert counts.sum() == TOKENS and not counts[40:].any()
    assert "experts' matrices got no token" in capfd.readouterr().err
    (file,) = converter().export(source, [Target("IQ2_XXS", tmp_path / "out.gguf")], importance=tmp_path / "matrix.gguf")
    assert file.types["ffn_up_exps"] == {"iq2_xxs": 1}
    made, wanted = (
        {tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]) for tensor in GGUFReader(path).tensors}
        for path in (file.path, plain.path)
    )
    for part in ("up", "gate", "down"):
        for expert in (int(counts.argmax()), 40, 63):
            ours, theirs = (found[f"blk.0.ffn_{part}_exps.weight"][expert] for found in (made, wanted))
            assert np.linalg.norm(ours - theirs) < 0.6 * np.linalg.norm(theirs), (part, expert)


LONG = [[random.Random(0).randrange(3, 512) for _ in range(250)]] * 4000  # a minute's work


def wait_until_it_reads(worker: int, gguf: Path) -> None:
    deadline = time.monotonic() + 120
    while not any(mapped.path == str(gguf) for mapped in psutil.Process(worker).memory_maps()):
        assert time.monotonic() < deadline, "the worker never opened the model"
        time.sleep(0.01)


def test_a_worker_that_dies_is_reported(unquantized, tmp_path):
    gguf, errors = unquantized["llama-deep"]["F32"], []

    def work() -> None:
        try:
            worker.collect(gguf, LONG, tmp_path / "matrix.gguf", dataset="rows", threads=1)
        except OlpackError as error:
            errors.append(str(error))

    with Converter() as worker:
        thread = threading.Thread(target=work)
        thread.start()
        wait_until_it_reads(worker.pid, gguf)
        os.kill(worker.pid, signal.SIGKILL)
        thread.join(timeout=60)
    assert "was killed by signal 9" in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_the_collection(unquantized, tmp_path):
    gguf = unquantized["llama-deep"]["F32"]
    # A suite that is run in the background inherits an ignored SIGINT; a person at a terminal does not.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from pathlib import Path; "
        "from olpack.export import collect_importance; rows = [list(range(3, 253))] * 4000; "
        f"collect_importance(Path({str(gguf)!r}), rows, Path({str(tmp_path / 'matrix.gguf')!r}), dataset='rows', threads=1)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=Path(__file__).parents[1], text=True)
    while not (workers := psutil.Process(child.pid).children()):
        time.sleep(0.01)
    wait_until_it_reads(workers[0].pid, gguf)
    child.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in child.communicate(timeout=60)[1]
    assert not workers[0].is_running()
    assert list(tmp_path.iterdir()) == []
