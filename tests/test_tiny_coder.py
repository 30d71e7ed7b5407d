"""The base model that ships: loadable, complete, in the shape that the exporter needs, and able to write Python that parses."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parent.parent / "olpack" / "assets" / "tiny-coder"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_the_folder_is_whole_and_small() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {
        "README.md",
        "LICENSE-PYTHON.txt",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert sum(files.values()) < 45e6
    for path in FOLDER.glob("*.json"):
        assert not any(root in path.read_text("utf-8") for root in ("/root/", "/home/", "/tmp/"))


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn x\n\n\n",
        "line\r\nline\r\n\r\n  \t mixed \n",
        "مرحبا بالعالم، \u200fשלום",
        "🙂👩\u200d💻🏳️\u200d🌈 e\u0301 é ﬁ \u00a0\u202f\u3000",
        "don 't , it ' s ! 12345 ٣٤٥ \x00\x1b[0m",
        " ",
        "",
    ],
)
def test_text_survives_byte_for_byte(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)).encode() == text.encode()


def test_special_tokens_are_single_ids(tokenizer) -> None:
    assert len(tokenizer) == 8192
    assert [tokenizer.encode(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [[0], [1], [2]]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert tokenizer.encode("x") == tokenizer.encode("x", add_special_tokens=False)


def test_chats_are_rendered_plainly(tokenizer) -> None:
    chat = [{"role": "user", "content": " two\nlines "}, {"role": "assistant", "content": "yes"}]
    turns = "<|im_start|>user\n two\nlines <|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == turns
    system = [{"role": "system", "content": "be"}, *chat[:1]]
    rendered = tokenizer.apply_chat_template(system, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\n two\nlines <|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(rendered)
    assert ids.count(1) == 3 and ids.count(2) == 2


def test_the_split_is_the_one_llama_cpp_calls_qwen2() -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    described = json.loads((FOLDER / "tokenizer.json").read_text("utf-8"))
    split, byte_level = described["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"]["Regex"] == PRETOKENIZE_REGEX and split["behavior"] == "Isolated"
    assert byte_level["type"] == "ByteLevel" and not byte_level["add_prefix_space"] and not byte_level["use_regex"]
    assert described["normalizer"] is None  # llama.cpp normalizes nothing


def test_weights_load_completely_and_suit_k_quants() -> None:
    model, info = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.tie_word_embeddings and model.config.max_position_embeddings == 2048
    assert 10e6 < model.num_parameters() < 25e6
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (it is no mapping)
            tensor = weights.get_slice(name)
            assert tensor.get_dtype() == "BF16", name
            assert len(tensor.get_shape()) < 2 or tensor.get_shape()[-1] % 256 == 0, name


def first_function(text: str) -> str:
    lines = text.split("\n")
    for number, line in enumerate(lines[1:], 1):
        if line.strip() and not line.startswith((" ", "\t", ")", "]", "}", "#")):
            return "\n".join(lines[:number])
    return "\n".join(lines)


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def test_completions_of_def_parse_more_often_than_not(model, tokenizer) -> None:
    torch.manual_seed(0)
    sampled = model.generate(**tokenizer(["def "] * 19, return_tensors="pt", return_token_type_ids=False), max_new_tokens=96)
    greedy = model.generate(**tokenizer("def ", return_tensors="pt", return_token_type_ids=False), max_new_tokens=96, do_sample=False)
    texts = [first_function(text) for text in tokenizer.batch_decode([*sampled, *greedy], skip_special_tokens=True)]
    assert all(text.startswith("def ") for text in texts) and len(texts) == 20
    assert sum(map(parses, texts)) > 10, "\n\n".join(texts)


def test_the_turn_marks_are_learned(model, tokenizer) -> None:
    asked = "<|im_start|>user\nContinue this code:\ndef add(a, b):\n<|im_end|>\n<|im_start|>assistant"
    ids = tokenizer(asked, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids).logits[0].argmax(-1).tolist()
    end = ids[0].tolist().index(tokenizer.eos_token_id)
    assert tokenizer.decode(expected[end:]) == "\n<|im_start|>assistant\n"
