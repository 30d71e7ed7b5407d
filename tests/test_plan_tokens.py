"""Before training: llama.cpp reads the rows as the tokens that are trained, and the template takes what every request begins with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
from gguf.gguf_writer import GGUFValue
from oracle import olpack

from olpack.export import verify
from olpack.export.converter import SourceModel
from olpack.export.job import TokenText
from olpack.export.plan import vocabulary_file
from olpack.export.verify import settle_pretokenizer, token_differences, training_tokenizer
from olpack.llamacpp.vocabulary import Vocabulary
from olpack.model.base import BUILTIN

RECIPE = "base: ../../base\ndata: {train: train.jsonl}\ntrain: {rank: 4, quantization: none}\nquants: [Q8_0]\ncompare: {reference: false}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> SourceModel:
    """tiny-coder's header, as the converter makes it."""
    folder = tmp_path_factory.mktemp("gguf")
    code, _, said = olpack(folder, "quantize", "builtin/tiny-coder", "--quant", "Q8_0")
    assert code == 0, said
    keys = {}
    for name, field in gguf.GGUFReader(folder / "tiny-coder-Q8_0.gguf").fields.items():
        if not name.startswith("GGUF."):
            kinds = list(field.types)
            keys[name] = GGUFValue(field.contents(), kinds[0], kinds[1] if len(kinds) > 1 else None)
    return SourceModel("qwen3", {}, keys)


@pytest.mark.parametrize("wrong", ["smollm", "gpt-2", "deepseek-coder", "deepseek-v3"])
def test_the_pre_tokenizer_that_splits_as_the_tokenizer_does_is_taken(model, wrong):
    """The converter's hash covers one text, and tokenizers that split otherwise can share it."""
    value = model.keys["tokenizer.ggml.pre"]
    asked = SourceModel(model.architecture, {}, {**model.keys, "tokenizer.ggml.pre": GGUFValue(wrong, value.type, value.sub_type)})
    settle_pretokenizer(BUILTIN / "tiny-coder", training_tokenizer(BUILTIN / "tiny-coder"), asked)
    assert asked.key("tokenizer.ggml.pre") == "qwen2"


def test_a_choice_that_splits_right_stays(model):
    value = model.keys["tokenizer.ggml.pre"]
    asked = SourceModel(model.architecture, {}, {**model.keys, "tokenizer.ggml.pre": GGUFValue("qwen2", value.type, value.sub_type)})
    settle_pretokenizer(BUILTIN / "tiny-coder", training_tokenizer(BUILTIN / "tiny-coder"), asked)
    assert asked.keys["tokenizer.ggml.pre"].value == "qwen2"


def test_the_first_token_that_differs_is_found(model):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(BUILTIN / "tiny-coder/tokenizer.json"))
    text = "def f(x):\n    return 12345 + x"
    ids = tokenizer.encode(text).ids
    seen = []
    same = TokenText("a:1", [text[:10], text[10:]], tokenizer.encode(text[:10]).ids + tokenizer.encode(text[10:]).ids)
    texts = [same, TokenText("a:2", [text], [*ids[:6], 77, *ids[7:]])]
    with vocabulary_file(model) as file, Vocabulary(file) as vocabulary:
        found = token_differences(vocabulary, texts, lambda done, total: seen.append((done, total)))[1]
    assert (found.source, found.before, found.trained[0], found.read[0]) == ("a:2", ids[2:6], 77, ids[6]) and seen == [(1, 2)] * 2


def test_the_rows_decide_where_the_sample_leaves_it_open(model, monkeypatch):
    from tokenizers import Tokenizer

    text = verify._SAMPLE
    monkeypatch.setattr(verify, "_SAMPLE", "a")
    tokenizer, value = Tokenizer.from_file(str(BUILTIN / "tiny-coder/tokenizer.json")), model.keys["tokenizer.ggml.pre"]
    for texts, name in (([], "gpt-2"), ([TokenText("a:1", [text], tokenizer.encode(text).ids)], "qwen2")):
        asked = SourceModel(model.architecture, {}, {**model.keys, "tokenizer.ggml.pre": GGUFValue("gpt-2", value.type, value.sub_type)})
        assert settle_pretokenizer(BUILTIN / "tiny-coder", tokenizer, asked, texts) == []
        assert asked.key("tokenizer.ggml.pre") == name


@pytest.mark.parametrize(("kind", "name"), [("TokenizersBackend", "smollm"), ("GPT2Tokenizer", "gpt-2")])
def test_the_tokenizer_that_training_loads_decides_and_not_the_file(tmp_path, kind, name):
    """Of a GPT2Tokenizer transformers takes the vocabulary from tokenizer.json, and not how that splits."""
    workspace(tmp_path, answer="It is    14,\n\n  and 1  2   3.")
    path = tmp_path / "base/tokenizer.json"
    content = json.loads(path.read_text())
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}]}
    path.write_text(json.dumps(content))
    path = tmp_path / "base/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": kind}))
    code, printed, said = olpack(tmp_path, "plan", "mine", "--json")
    assert code == 0, said
    found = json.loads(printed)["estimate"]
    assert (found["pre_tokenizer"], found["texts_differing"]) == (name, 0) and found["texts_read"] > 40


def test_rows_that_only_the_tokenizer_composes_are_refused_with_the_form_that_they_need(tmp_path):
    workspace(tmp_path, answer="It is 14 in the cafe\u0301.", normalizer={"type": "NFC"})
    code, _, said = olpack(tmp_path, "plan", "mine")
    text = " ".join(said.split())
    assert code == 1 and "composes characters (NFC), and llama.cpp does not" in text and "None of its pre-tokenizers" not in text


def workspace(tmp_path: Path, answer: str = "It is 4.", normalizer: dict | None = None, template: str | None = None, modelfile: str = "") -> None:
    shutil.copytree(BUILTIN / "tiny-coder", tmp_path / "base")
    if normalizer:
        path = tmp_path / "base/tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": normalizer}))
    if template:
        (tmp_path / "base/chat_template.jinja").write_text(template)
    package = tmp_path / "modelfiles/mine"
    package.mkdir(parents=True)
    (package / "recipe.yaml").write_text(RECIPE + modelfile)
    rows = [[{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": answer if n == 7 else f"It is {2 * n}."}] for n in range(40)]
    (package / "train.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))


def test_rows_that_llama_cpp_reads_otherwise_are_refused_before_training(tmp_path):
    """llama.cpp normalizes nothing."""
    workspace(tmp_path, answer="HELLO, it is 14.", normalizer={"type": "Lowercase"})
    code, _, said = olpack(tmp_path, "build", "mine", "--no-deploy")
    text = " ".join(said.split())
    assert code == 1 and "llama.cpp reads train.jsonl:" in text and "in place of" in text and "Take the tokenizer files" in text
    assert not (tmp_path / "build/mine/adapter").exists()


def test_a_made_up_conversation_that_differs_is_a_warning(tmp_path):
    workspace(tmp_path, normalizer={"type": "Replace", "pattern": {"String": "naïve"}, "content": "naive"})
    code, _, said = olpack(tmp_path, "plan", "mine")
    text = " ".join(said.split())
    assert code == 0, said
    assert "warning: llama.cpp reads the conversation with emoji and joiners as other tokens than training does" in text
    assert text.count("as other tokens than training does") == 1


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("modelfile", "said"),
    [
        ("modelfile: {system: Be brief.}\n", "(modelfile.system): System role not supported"),
        ("modelfile: {messages: [{role: user, content: Hi}]}\n", "(modelfile.messages): roles must alternate"),
    ],
)
def test_what_the_template_refuses_of_every_request_is_refused(tmp_path, modelfile, said):
    workspace(tmp_path, template=NO_SYSTEM, modelfile=modelfile)
    code, _, printed = olpack(tmp_path, "plan", "mine")
    text = " ".join(printed.split())
    assert code == 1 and f"refuses what each request would begin with {said}" in text, printed


def test_the_same_template_serves_without(tmp_path):
    workspace(tmp_path, template=NO_SYSTEM)
    code, _, printed = olpack(tmp_path, "plan", "mine")
    assert code == 0, printed
