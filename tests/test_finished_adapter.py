"""An adapter that was trained elsewhere becomes quants: the build copies it, trains nothing, and refuses one that does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader
from ollama_double import OllamaDouble
from oracle import files, olpack, write_base, write_rows
from safetensors.torch import load_file

from olpack.compare.results import read_results

CONFIGURATIONS = Path(__file__).parent / "data/import"


def train_with_peft(base: Path, out: Path) -> None:
    """An adapter that peft makes and saves, with weights that change what the model answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(out)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An adapter, the base that its configuration names, and rows."""
    root = tmp_path_factory.mktemp("theirs")
    config = write_base(root / "model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 1024}))  # the comparison has prompts of 512 tokens
    train_with_peft(root / "model", root / "theirs")
    write_rows(root / "eval.jsonl", 4)
    code, _, said = olpack(root, "import", "theirs", "--name", "guest", "--eval", "eval.jsonl")
    assert code == 0, said
    return root


@pytest.fixture(scope="module")
def built(made) -> Path:
    """One command: import, build, and four tags on a server."""
    with OllamaDouble(made) as server:
        words = ["import", "theirs", "--name", "one", "--eval", "eval.jsonl", "--build", "--json"]
        code, printed, said = olpack(made, *words, server=server.url)
        assert code == 0, said
        assert "nothing is trained" in said
        result = json.loads(printed)
        assert result["import"]["recipe"] == "modelfiles/one/recipe.yaml" and result["done"][0] == "train"
        tags = [one["model"] for one in result["steps"]["deploy"]["registered"]]
        assert tags == ["one:q4_0", "one:q4_K_M", "one:q5_K_M", "one:q8_0"]
        assert "identical" in result["steps"]["deploy"]["identity"]
    return made


def test_the_adapter_is_copied_and_every_quant_is_compared(built):
    copied = built / "build/one/adapter"
    assert sorted(path.name for path in copied.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (built / "theirs", copied))
    assert theirs.keys() == ours.keys() and all((theirs[name] == ours[name]).all() for name in theirs)
    results = read_results(built / "build/one/compare/results.json")
    assert [quant.quant for quant in results.quants] == ["Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0"]
    assert all(quant.loss and quant.divergence for quant in results.quants)
    assert (built / "build/one/modelfiles/q4_K_M.Modelfile").is_file()


def test_the_quants_contain_the_adapter(built, tmp_path):
    words = ["quantize", built / "model", "--adapter", built / "theirs", "--quant", "Q8_0", "--name", "one", "--out", tmp_path]
    assert olpack(tmp_path, *map(str, words))[0] == 0
    merged, ours = (
        {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}
        for path in (tmp_path / "one-Q8_0.gguf", built / "build/one/gguf/one-Q8_0.gguf")
    )
    assert merged == ours and len(ours) > 20


def test_a_second_build_does_nothing_and_another_adapter_is_copied(built, tmp_path):
    shutil.copytree(built, root := tmp_path / "again")
    assert "up to date" in olpack(root, "build", "one")[2]
    assert "copied from" in olpack(root, "show", "one")[1]
    config = root / "theirs/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
    before = files(root / "build/one/gguf")
    code, _, said = olpack(root, "export", "one")
    assert code == 1 and "train.adapter changed" in said
    assert olpack(root, "train", "one")[0] == 0 and olpack(root, "export", "one")[0] == 0
    assert files(root / "build/one/gguf").keys() == before.keys() and files(root / "build/one/gguf") != before


def test_the_plan_trains_nothing(made):
    code, printed, said = olpack(made, "plan", "guest", "--json", "--out", "elsewhere")
    assert code == 0, said
    estimate = json.loads(printed)["estimate"]
    assert (estimate["train_rows"], estimate["steps"], estimate["train_seconds"]) == (0, 0, None)
    assert estimate["adapter_parameters"] == sum(weight.numel() for weight in load_file(made / "theirs/adapter_model.safetensors").values())
    code, printed, _ = olpack(made, "plan", "guest", "--out", "elsewhere")
    assert code == 0 and "none: the adapter ../../theirs" in printed
    assert olpack(made, "data", "check", "guest")[0] == 0
    assert not (made / "elsewhere").exists()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("train.adapter=../../model", "is no adapter: it has no adapter_config.json"),
        ("train.adapter=../../none", "is no adapter: it has no adapter_config.json"),
        ("train.rank=8", "nothing is trained: leave out rank"),
        ("train.merge_base=dequantized", "does not record how olpack quantized its base"),
        ("train.adapter=null", "data.train is missing"),
        ("data={train: eval.jsonl}", "data.eval is missing"),
        ("export.importance=train", "export.importance: train reads training rows"),
        ("quants=[4.6bpw]", "4.6BPW reads training rows"),
        ("base=builtin/tiny-coder", "for another base"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(made, setting, reason):
    code, _, said = olpack(made, "build", "guest", "--set", setting, "--out", "elsewhere")
    assert code == 1 and reason in said, said
    assert not list(made.glob("elsewhere/*/adapter")) and not list(made.glob("elsewhere/*/gguf"))


def test_tokens_and_templates_that_the_base_lacks(made, tmp_path):
    shutil.copytree(made, root := tmp_path / "root", ignore=shutil.ignore_patterns("build", "one"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "model" / name, root / "theirs" / name)
    settings = json.loads((root / "theirs/tokenizer_config.json").read_text())
    (root / "theirs/chat_template.jinja").write_text(settings["chat_template"].replace("<|im_start|>{{ m.role }}", "<|im_start|>{{ m.role }}:"))
    code, _, said = olpack(root, "plan", "guest")
    assert code == 0 and "writes ../../eval.jsonl:1 otherwise than that of" in said, said
    (root / "theirs/chat_template.jinja").write_text(settings["chat_template"] + "{# the same #}")
    assert "otherwise" not in olpack(root, "plan", "guest")[2]
    tokenizer = json.loads((root / "theirs/tokenizer.json").read_text())
    number = max(token["id"] for token in tokenizer["added_tokens"]) + 1
    number = max(number, len(tokenizer["model"]["vocab"]))
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": number, "content": "<|new|>"})
    (root / "theirs/tokenizer.json").write_text(json.dumps(tokenizer))
    code, _, said = olpack(root, "plan", "guest")
    assert code == 1 and "and a build reads all rows with the base's" in said, said


def test_an_adapter_beside_a_shared_base(made):
    code, _, said = olpack(made, "plan", "guest", "--set", "package=adapter")
    assert code == 0, said


@pytest.mark.parametrize("name", ["axolotl-lora.yaml", "llama-factory-qlora.yaml", "unsloth_alpaca.py", "mario.Modelfile"])
def test_a_build_of_an_imported_configuration_is_planned(tmp_path, name):
    shutil.copytree(CONFIGURATIONS, tmp_path, dirs_exist_ok=True)
    words = ["--name", "mine", "--base", "builtin/tiny-coder", "--train", "data/chats.jsonl", "--eval", "data/held_out.jsonl"]
    assert olpack(tmp_path, "import", name, *words)[0] == 0
    code, printed, said = olpack(tmp_path, "plan", "mine", "--json")
    assert code == 0, said
    settings = json.loads(printed)["settings"]
    assert settings["base"]["from"].startswith("recipe.yaml:") and len([one for one in settings.values() if one["from"] != "default"]) > 5
