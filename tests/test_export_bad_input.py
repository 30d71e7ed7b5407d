"""What cannot become a GGUF is named before any work, and an export that fails leaves everything as it was."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import CHAT_TEMPLATE, converter, write_adapter, write_model, write_sentencepiece, write_tokenizer

from olpack.errors import OlpackError
from olpack.export import Target
from olpack.export.client import Converter
from olpack.export.job import partial_path
from olpack.export.plan import FilePlan
from olpack.export.run import check_space
from olpack.quants import quant_type

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def refused(source: Path, quants: tuple[str, ...] = ("Q4_K_M",)) -> str:
    with pytest.raises(OlpackError) as error:
        converter().check(source, quants)
    assert error.value.remedy
    return str(error.value)


def change_config(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def truncate(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 100)


def rename_to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def change_tensors(folder: Path, change: Callable[[dict], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose_a_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def swap_with_a_wider_model(folder: Path) -> None:
    wider = write_model(folder.parent / "wider", intermediate_size=768)
    shutil.copy(wider / "model.safetensors", folder)


def declare_a_wrong_size(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"shape":[512,256]', b'"shape":[256,256]', 1))


def use_other_pattern(folder: Path) -> None:
    write_tokenizer(folder, pattern=r"[a-z]+|[^a-z]")


def take_away_the_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "and its header declares"),
        (lambda folder: (folder / "model.safetensors").open("ab").write(bytes(8)), "and its header declares"),
        (declare_a_wrong_size, "is damaged: the size of 'model.embed_tokens.weight' does not fit its shape"),
        (swap_with_a_wider_model, "tensor 'blk.0.ffn_gate.weight' has wrong shape; expected 256, 512, got 256, 768, 1, 1. Compare its config.json"),
        (lose_a_tensor, "llama.cpp would refuse the model made from"),
        (lambda folder: (folder / "model.safetensors").unlink(), "contains no weights (no model*.safetensors)"),
        (rename_to_pickle, "has its weights as pickle only (pytorch_model.bin)"),
        (take_away_the_tokenizer, "has no tokenizer (no tokenizer.json or tokenizer.model)"),
        (use_other_pattern, "llama.cpp has no pre-tokenizer like the one in"),
        (lambda folder: change_config(folder, vocab_size=260), "has more tokens than the model's embedding has rows"),
        (lambda folder: change_config(folder, vocab_size=600), "has a vocabulary of 600 tokens, and its embedding has 512 rows"),
        (lambda folder: (folder / "config.json").unlink(), "is no model folder: it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: change_config(folder, architectures=["NoSuchForCausalLM"]), "does not know the architecture 'NoSuchForCausalLM'"),
        (lambda folder: change_config(folder, quantization_config={"quant_method": "spqr"}), "is quantized by SpQR"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"not a model at all"), "is truncated within its header"),
        (shutil.rmtree, "There is no model folder"),
    ],
)
def test_a_folder_that_cannot_be_exported_is_refused(copy, damage, reason):
    damage(copy)
    assert reason in refused(copy)


def test_a_missing_shard_is_named(tmp_path):
    source = write_model(tmp_path / "model", shard="300KB")
    (source / "model-00002-of-00009.safetensors").unlink(missing_ok=True)
    next(source.glob("model-00003-of-*.safetensors")).unlink()
    assert "lacks model-0000" in refused(source)


def test_a_shard_that_holds_another_one_is_named(tmp_path):
    source = write_model(tmp_path / "model", shard="300KB")
    shards = sorted(source.glob("model-*.safetensors"))
    shutil.copy(shards[0], shards[1])
    assert "tensors that its files lack, the first is 'model." in refused(source)


def test_a_sentencepiece_vocabulary_that_does_not_fit_is_refused(tmp_path):
    source = write_model(tmp_path / "model", "phi3", tied=False, vocab_size=300)
    write_sentencepiece(source)
    assert "has more tokens than the model's embedding has rows" in refused(source)


def test_a_shape_that_llama_cpp_cannot_load_is_refused_before_any_work(tmp_path):
    source = write_model(tmp_path / "model", "phi3", tied=False, hidden_size=192, bos_token_id=1, eos_token_id=2)  # heads are not 192 / 4 wide
    write_sentencepiece(source)
    assert "tensor 'blk.0.attn_qkv.weight' has wrong shape; expected 192, 384, got 192, 512" in refused(source)


def test_a_quantized_gguf_is_no_source(model, tmp_path):
    (file,) = converter().export(model, [Target("Q4_0", tmp_path / "model.gguf")])
    assert "is quantized already: 'token_embd.weight' is Q6_K" in refused(file.path)


def test_a_truncated_gguf_is_no_source(model, tmp_path):
    (file,) = converter().export(model, [Target("F16", tmp_path / "model.gguf")])
    with file.path.open("r+b") as opened:
        opened.truncate(file.size - 1000)
    assert "is truncated: it has" in refused(file.path)


def test_quant_types_that_cannot_be_made_are_refused(model):
    assert "Did you mean Q4_K_M?" in refused(model, ("Q4_KM",))
    assert "IQ2_XS needs an importance matrix. Set `export.importance: train` in the recipe" in refused(model, ("IQ2_XS",))


def test_an_unknown_end_of_turn_is_refused(model, tmp_path):
    with pytest.raises(OlpackError, match="ends a turn with '<end>', which is no token"):
        converter().export(model, [Target("Q4_0", tmp_path / "model.gguf")], chat_template=CHAT_TEMPLATE, end_of_turn="<end>")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named_and_nothing_is_written(copy, tmp_path, value):
    change_tensors(copy, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(value))
    out = tmp_path / "out"
    out.mkdir()
    (out / "Q4_0.gguf").write_text("what was here before")
    with pytest.raises(OlpackError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' has an infinite or undefined value"):
        converter().export(copy, [Target(quant, out / f"{quant}.gguf") for quant in ("Q4_0", "F32")])
    assert [path.name for path in out.iterdir()] == ["Q4_0.gguf"]
    assert (out / "Q4_0.gguf").read_text() == "what was here before"


def test_an_adapter_that_diverged_is_named_and_nothing_is_written(model, tmp_path):
    from safetensors.torch import load_file, save_file

    file = write_adapter(tmp_path / "adapter", model, target_modules=["q_proj"]) / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(OlpackError, match=r"'model\.layers\.0\.self_attn\.q_proj\.weight' has an infinite or undefined value"):
        converter().export(model, [Target("Q4_0", tmp_path / "out" / "model.gguf")], adapter=tmp_path / "adapter")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_name_that_llama_cpp_takes_for_another_model_is_refused_before_any_work(model):
    with pytest.raises(OlpackError, match="with 'phi-3' in its name for a Phi-3, and could not load 'My-Phi-3', whose vocabulary has no '</s>'"):
        converter().check(model, ["Q4_0"], name="My-Phi-3")


def test_special_tokens_that_swallow_spaces_are_announced(copy):
    path = copy / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["added_tokens"][1]["rstrip"] = True
    path.write_text(json.dumps(settings))
    (warning,) = converter().check(copy, ["Q4_0"]).warnings
    assert "drops spaces and line breaks after '<|im_start|>', and llama.cpp keeps them under this name" in warning
    settings["added_tokens"][1]["rstrip"] = False
    path.write_text(json.dumps(settings))
    assert converter().check(copy, ["Q4_0"]).warnings == []


def test_two_targets_need_two_paths(model, tmp_path):
    with pytest.raises(OlpackError, match="the same file as target"):
        converter().export(model, [Target("Q4_0", tmp_path / "a.gguf"), Target("Q8_0", tmp_path / "a.gguf")])


def test_a_disk_that_is_too_small_is_noticed_before_any_work(tmp_path):
    plan = FilePlan(quant_type("F32"), b"", [("token_embd.weight", 0, 1 << 60)], [])
    with pytest.raises(OlpackError, match=r"The files need 1152921\.5 TB in"):
        check_space([tmp_path / "new" / "model.gguf"], [plan.size])


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    model = write_model(tmp_path / "model", hidden_size=512, intermediate_size=1024)
    size = converter().check(model, ["F32"]).sizes["F32"]
    before = resource.prlimit(converter().pid, resource.RLIMIT_FSIZE, (size * 3 // 4, resource.RLIM_INFINITY))  # beyond, writing fails
    try:
        with pytest.raises(OlpackError, match=r"Writing .* failed: File too large"):
            converter().export(model, [Target(quant, tmp_path / "out" / f"{quant}.gguf") for quant in ("Q4_0", "F32")])
    finally:
        resource.prlimit(converter().pid, resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "out").iterdir()) == []


def wait_for_partial(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in folder.glob(".*.partial")):
        assert time.monotonic() < deadline, "the export never began to write"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("slow") / "model", hidden_size=768, intermediate_size=3072, num_hidden_layers=4)


SLOW = ("Q2_K", "Q3_K_M", "IQ3_S", "Q4_K_M")


def test_ctrl_c_leaves_nothing(slow_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    targets = ", ".join(f"Target({quant!r}, Path({str(out / quant)!r}))" for quant in SLOW)
    # A suite that is run in the background inherits an ignored SIGINT; a person at a terminal does not.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from pathlib import Path; "
        f"from olpack.export import Target, export; export(Path({str(slow_model)!r}), [{targets}], threads=1)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=REPOSITORY, text=True)
    wait_for_partial(out)
    child.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in child.communicate(timeout=60)[1]
    assert list(out.iterdir()) == []


def test_a_worker_that_is_killed_is_reported_and_leaves_nothing(slow_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    errors = []

    def work() -> None:
        try:
            worker.export(slow_model, [Target(quant, out / quant) for quant in SLOW], threads=1)
        except OlpackError as error:
            errors.append(str(error))

    with Converter() as worker:
        thread = threading.Thread(target=work)
        thread.start()
        wait_for_partial(out)
        os.kill(worker.pid, signal.SIGKILL)
        thread.join(timeout=60)
    assert "The export worker was killed by signal 9" in errors[0] and "most likely" not in errors[0]
    assert list(out.iterdir()) == []


def test_what_a_killed_export_left_is_removed_by_the_next(model, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = partial_path(tmp_path / "model.gguf", gone.pid)
    other = partial_path(tmp_path / "model.gguf", os.getpid())
    left.touch()
    other.touch()
    (file,) = converter().export(model, [Target("Q8_0", tmp_path / "model.gguf")])
    assert sorted(tmp_path.iterdir()) == sorted([file.path, other])
