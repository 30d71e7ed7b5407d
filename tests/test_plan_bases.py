"""Bases as people have them: SentencePiece vocabularies, leftovers in config.json, weights that are not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader
from tiny_models import converter, write_adapter, write_model, write_sentencepiece, write_vision_model

from olpack.base import Base, resolve
from olpack.errors import OlpackError
from olpack.export import Target
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


def test_a_sentencepiece_vocabulary_has_its_end_of_turn(copy, tmp_path):
    write_sentencepiece(copy)
    (file,) = converter().export(copy, [Target("Q8_0", tmp_path / "a.gguf")], end_of_turn="</s>")
    assert GGUFReader(file.path).fields["tokenizer.ggml.eot_token_id"].contents() == 2


def test_tokens_that_tokenizer_json_calls_special_are_control_tokens(copy, tmp_path):
    write_sentencepiece(copy)
    edit_me = copy / "tokenizer.json"
    edit_me.write_text(json.dumps({"model": {"type": "BPE"}, "added_tokens": [{"id": 300, "content": "x", "special": True}]}))
    from olpack.export.converter import _mark_special

    class Types:
        value = [1] * 400  # noqa: RUF012

    class Writer:
        kv_data = ({"tokenizer.ggml.token_type": Types},)

    _mark_special(copy, Writer)
    assert [number for number, kind in enumerate(Types.value) if kind != 1] == [300] and Types.value[300] == 3


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
