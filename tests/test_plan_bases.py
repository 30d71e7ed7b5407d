"""Bases as people have them: SentencePiece vocabularies, leftovers in config.json, weights that are not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader
from tiny_models import converter, write_adapter, write_fast_sentencepiece, write_model, write_sentencepiece, write_vision_model

from olpack.errors import OlpackError
from olpack.export import Target
from olpack.model.base import Base, resolve
from olpack.recipe import Train
from olpack.train.checks import check_training


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def edit(path: Path, **settings: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def sentencepiece_model(folder: Path, kind: str, special: list[str], begin: str, files: list[str], **trainer: object) -> Path:
    """A model whose tokenizer is in the files named."""
    write_sentencepiece(folder.parent / "tokenizer", **trainer)
    size = write_fast_sentencepiece(folder.parent / "tokenizer", special, begin)
    write_model(folder, kind, vocab_size=size)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    for name in (*files, "tokenizer_config.json"):
        shutil.copy(folder.parent / "tokenizer" / name, folder)
    return folder


@pytest.mark.parametrize("files", [["tokenizer.json"], ["tokenizer.model"], ["tokenizer.json", "tokenizer.model"]])
def test_a_sentencepiece_vocabulary_has_its_end_of_turn(tmp_path, files):
    """ggml-org/llama.cpp#14715 and the like: the token's text is compared with text, not with the bytes that the converter keeps."""
    source = sentencepiece_model(tmp_path / "model", "llama", ["<unk>", "<s>", "</s>"], "<s>", files)
    (file,) = converter().export(source, [Target("Q8_0", tmp_path / "a.gguf")], end_of_turn="</s>")
    fields = GGUFReader(file.path).fields
    ends = [fields[key].contents() for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in fields]
    assert 2 in ends
    with pytest.raises(OlpackError, match="ends a turn with '<|no|>', which is no token"):
        converter().export(source, [Target("Q8_0", tmp_path / "b.gguf")], end_of_turn="<|no|>")


def test_tokens_that_tokenizer_json_calls_special_are_control_tokens(tmp_path):
    """unslothai/unsloth#5070: Gemma's marks of a turn lie within its SentencePiece table."""
    marks = ["<start_of_turn>", "<end_of_turn>"]
    source = sentencepiece_model(
        tmp_path / "model", "gemma3_text", ["<pad>", "<eos>", "<bos>", "<unk>", *marks], "<bos>", ["tokenizer.json", "tokenizer.model"],
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", user_defined_symbols=[*marks, "<own>"],
        add_dummy_prefix=False, remove_extra_whitespaces=False,
    )  # fmt: skip
    fast = json.loads((source / "tokenizer.json").read_text())
    own = {"id": 6, "content": "<own>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    edit(source / "tokenizer.json", added_tokens=[*fast["added_tokens"], own])
    (file,) = converter().export(source, [Target("Q8_0", tmp_path / "a.gguf")], end_of_turn=marks[1])
    fields = GGUFReader(file.path).fields
    assert fields["tokenizer.ggml.token_type"].contents()[:7] == [3, 3, 3, 2, 3, 3, 4]
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 5


@pytest.mark.parametrize("promised", [0, 1])
def test_a_head_for_more_tokens_that_is_only_promised(tmp_path, promised):
    source = write_model(
        tmp_path / "model", "qwen3_5_text", linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64,
        num_hidden_layers=4,
    )  # fmt: skip
    edit(source / "config.json", mtp_num_hidden_layers=promised)
    (file,) = converter().export(source, [Target("Q8_0", tmp_path / "a.gguf")])
    fields = GGUFReader(file.path).fields
    assert fields["qwen35.block_count"].contents() == 4
    assert not any("nextn" in name for name in fields)


def test_a_head_that_would_be_random_is_refused(copy):
    edit(copy / "config.json", tie_word_embeddings=False)
    with pytest.raises(OlpackError, match="has no 'lm_head.weight': training would begin with random numbers there"):
        check_training(Base("copy", copy), Train(), on_gpu=False)


def test_whole_bases_lack_nothing(model, tmp_path):
    for source in (model, write_vision_model(tmp_path / "vision"), write_model(tmp_path / "untied", "llama", tied=False)):
        check_training(Base(source.name, source), Train(), on_gpu=False)


def test_a_leftover_quantization_is_not_believed(copy):
    edit(copy / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    base = Base("copy", copy)
    assert base.leftover_quantization and "quantization_config" not in base.config
    check_training(base, Train(), on_gpu=False)


def test_an_adapter_is_called_one(model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", model)
    for refuse in (lambda: converter().check(adapter, ["Q8_0"]), lambda: resolve(str(adapter), relative_to=tmp_path)):
        with pytest.raises(OlpackError, match=f"is an adapter, no model; its base is {model}") as error:
            refuse()
        assert "--adapter" in error.value.remedy


def test_a_setting_that_is_missing_is_not_the_tokenizers(tmp_path):
    source = write_model(tmp_path / "model", "cohere2", num_hidden_layers=4)
    with pytest.raises(OlpackError, match=r"misses 'rotary_pct' in '.*config\.json'"):
        converter().check(source, ["Q8_0"])


def test_a_context_that_the_configuration_leaves_to_its_default(tmp_path):
    folder = tmp_path / "gemma"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 64}}))
    assert Base("gemma", folder).context_length == 131_072


def test_a_tokenizer_of_mistrals_own_is_one(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    (copy / "tekken.json").write_text("{}")
    assert resolve(str(copy), relative_to=copy).path == copy
