"""Before training: special tokens of the rows that the base never trained, and a tokenizer class that does not fit its vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from oracle import CHAT, olpack
from quantized_bases import write_quantized
from safetensors.torch import load_file, save_file
from tiny_models import write_fast_sentencepiece, write_model, write_sentencepiece, write_vision_model
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, LlamaTokenizer

from olpack.data import Chat, Renderer
from olpack.errors import OlpackError
from olpack.model.base import BUILTIN, Base
from olpack.recipe import Train
from olpack.train.untrained_tokens import untrained_tokens

START, END = "<|im_start|>", "<|im_end|>"  # 1 and 2
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("tied") / "model")


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("untied") / "model", tied=False, shard="500KB")


def change(folder: Path, name: str, **vectors) -> None:
    """Give tokens other vectors: `t1=0` is zeros, `t1="t2"` is the vector of token 2, `t1=("t2", 0.02)` is 0.02 of its length away from that."""
    file = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    table = tensors[name]
    for token, value in vectors.items():
        source, apart = value if isinstance(value, tuple) else (value, 0.0)
        vector = torch.zeros(table.shape[1]) if source == 0 else table[int(source[1:])].float()
        noise = torch.randn(table.shape[1])
        table[int(token[1:])] = (vector + apart * vector.norm() * noise / noise.norm()).to(table.dtype)
    save_file(tensors, file, metadata={"format": "pt"})


def reserve(folder: Path, *tokens: str) -> None:
    """Call the last tokens of the vocabulary so and add them as special ones."""
    file = folder / "tokenizer.json"
    kept = json.loads(file.read_text())
    size = len(kept["model"]["vocab"])
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for number, token in enumerate(tokens, size - len(tokens)):
        old = next(name for name, at in kept["model"]["vocab"].items() if at == number)
        kept["model"]["merges"] = [pair for pair in kept["model"]["merges"] if "".join(pair) != old and old not in pair]
        kept["model"]["vocab"][token] = kept["model"]["vocab"].pop(old)
        kept["added_tokens"].append({"id": number, "content": token, **plain})
    file.write_text(json.dumps(kept))


def said(folder: Path, package: str = "merged", **settings) -> str | None:
    base = Base("mine", folder)
    tokenizer = base.tokenizer()
    tokenizer.chat_template = CHAT
    rows = Renderer(tokenizer).rows(Chat([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}], "a:1"))
    return untrained_tokens(base, Train(**settings), tokenizer, rows, package)


@pytest.fixture
def copy(tmp_path):
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def test_plan_warns_of_tokens_that_the_base_never_trained(tmp_path):
    shutil.copytree(BUILTIN / "tiny-coder", tmp_path / "base")
    package = tmp_path / "modelfiles/mine"
    package.mkdir(parents=True)
    (package / "recipe.yaml").write_text("base: ../../base\ndata: {train: train.jsonl}\ntrain: {rank: 4, quantization: none}\nquants: [Q8_0]\n")
    rows = [[{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}] for n in range(40)]
    (package / "train.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    code, _, printed = olpack(tmp_path, "plan", "mine")
    assert code == 0 and "never trained" not in " ".join(printed.split()), printed
    change(tmp_path / "base", EMBEDDING, t1=0, t2=0)
    code, _, printed = olpack(tmp_path, "plan", "mine")
    text = " ".join(printed.split())
    assert code == 0 and f"{START}, {END} in embed_tokens." in text and "`train.modules_to_save: [embed_tokens]`" in text, printed


@pytest.mark.parametrize(("with_system", "warned"), [(0, True), (15, True), (20, False), (40, False)])
def test_plan_warns_of_a_system_prompt_that_most_rows_do_not_have(tmp_path, with_system, warned):
    package = tmp_path / "modelfiles/mine"
    package.mkdir(parents=True)
    recipe = "base: builtin/tiny-coder\ndata: {train: train.jsonl, eval: eval.jsonl}\nquants: [Q8_0]\nmodelfile: {system: Be brief.}\n"
    (package / "recipe.yaml").write_text(recipe)
    rows = [[{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}] for n in range(45)]
    rows = [[{"role": "system", "content": "Be brief."}, *row] if n < with_system else row for n, row in enumerate(rows)]
    (package / "train.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows[:40]))
    (package / "eval.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows[40:]))
    code, _, printed = olpack(tmp_path, "plan", "mine")
    text = " ".join(printed.split())
    assert code == 0 and (f"and {40 - with_system} of 40 training chats have none" in text) == warned, printed


def test_trained_vectors_are_no_reason_to_warn(tied, untied):
    assert said(tied) is None and said(untied) is None and said(BUILTIN / "tiny-coder") is None


@pytest.mark.parametrize("apart", [0.0, 0.02])
def test_two_tokens_with_the_same_vector(tied, copy, apart):
    folder = copy(tied)
    change(folder, EMBEDDING, t1=("t2", apart))
    assert f"{START}, {END} in embed_tokens." in said(folder)


@pytest.mark.parametrize("apart", [0.0, 0.02])
def test_a_token_with_the_vector_of_a_reserved_one(tied, copy, apart):
    folder = copy(tied)
    reserve(folder, "<|reserved_special_token_5|>", "<|reserved_special_token_6|>")
    assert said(folder) is None
    last = len(Base("mine", folder).tokenizer()) - 1
    change(folder, EMBEDDING, **{f"t{last - 1}": ("t2", apart)})
    assert f": {END} in embed_tokens." in said(folder)


def test_a_token_with_the_vector_of_the_padding_behind_the_vocabulary(tmp_path):
    folder = write_model(tmp_path / "model", vocab_size=576)
    assert said(folder) is None
    change(folder, EMBEDDING, t2="t550")
    assert f": {END} in embed_tokens." in said(folder)


def test_an_output_layer_of_its_own_is_judged_by_target_tokens(untied, copy):
    folder = copy(untied)
    change(folder, "lm_head.weight", t1=0, t2=0)
    text = said(folder)
    assert f": {END} in lm_head." in text and "`train.modules_to_save: [lm_head]`" in text
    change(folder, EMBEDDING, t1=0)
    text = said(folder)
    assert f": {START} in embed_tokens; {END} in lm_head." in text and "`train.modules_to_save: [embed_tokens, lm_head]`" in text


def test_what_the_adapter_trains_is_not_judged(untied, tied, copy):
    folder = copy(untied)
    change(folder, "lm_head.weight", t2=0)
    assert said(folder, modules_to_save=["lm_head"]) is None
    assert said(folder, target_modules=["q_proj", "lm_head"]) is None
    assert "`train.modules_to_save: [norm, lm_head]`" in said(folder, modules_to_save=["norm"])


def test_an_embedding_that_is_trained_under_the_name_of_the_output_layer(tied, copy):
    folder = copy(tied)
    change(folder, EMBEDDING, t2=0)
    assert said(folder, modules_to_save=["lm_head"]) is None


def test_what_must_be_set_besides_is_named(tied, copy):
    folder = copy(tied)
    change(folder, EMBEDDING, t2=0)
    assert "`train.modules_to_save: [embed_tokens]` and `package: merged`" in said(folder, "adapter")
    assert "`train.modules_to_save: [embed_tokens]` and `train.method: lora`" in said(folder, method="vera")


@pytest.mark.parametrize("name", ["gptq-4", "nf4-double"])
def test_a_base_that_comes_quantized(tied, copy, tmp_path, name):
    folder = copy(tied)
    change(folder, EMBEDDING, t2=0)
    write_quantized(name, folder, tmp_path / "quantized", tmp_path / "plain")
    assert f": {END} in embed_tokens." in said(tmp_path / "quantized")


def test_embeddings_of_other_names(tmp_path):
    folder = write_vision_model(tmp_path / "vision")
    assert said(folder) is None
    change(folder, "language_model.model.embed_tokens.weight", t2=0)
    assert f": {END} in embed_tokens." in said(folder)
    other = write_model(tmp_path / "neox", "gpt_neox", tied=False)
    change(other, "gpt_neox.embed_in.weight", t1=0)
    change(other, "embed_out.weight", t2=0)
    assert f": {START} in embed_in; {END} in lm_head." in said(other)


# -- a class that does not fit the vocabulary -----------------------------------------------------------------------------------------------


def name_class(folder: Path, name: str) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": name}))


@pytest.mark.parametrize(
    ("write", "made"),
    [
        (lambda folder: write_model(folder, "llama"), "'Unk token `<unk>` not found"),
        (lambda folder: shutil.copytree(BUILTIN / "tiny-coder", folder), "'a.+b.+c' of"),
    ],
)
def test_a_class_that_loses_the_spaces_of_a_byte_level_vocabulary_is_refused(tmp_path, write, made):
    """huggingface/transformers#45488: what LlamaTokenizerFast did is cured, and other classes still do it."""
    write(folder := tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    name_class(folder, "GemmaTokenizerFast")
    with pytest.raises(OlpackError, match=rf"makes {made}.* GemmaTokenizer, and .*tokenizer.json by itself makes 'a b\\n  c'") as caught:
        Base("mine", folder).tokenizer()
    assert "Set `tokenizer_class` to PreTrainedTokenizerFast in tokenizer_config.json" in str(caught.value.remedy)
    name_class(folder, "PreTrainedTokenizerFast")
    tokenizer = Base("mine", folder).tokenizer()
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"


def test_a_version_of_transformers_without_the_cure_is_refused(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", "llama")
    name_class(folder, "LlamaTokenizerFast")
    tokenizer = Base("mine", folder).tokenizer()
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", LlamaTokenizer.from_pretrained)
    with pytest.raises(OlpackError, match="makes '.*' of 'a b.* with its class LlamaTokenizer"):
        Base("mine", folder).tokenizer()


def test_a_tokenizer_that_leaves_out_spaces_on_purpose_is_taken(tied, copy):
    folder = copy(tied)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.normalizer = normalizers.Replace(" ", "")
    own.save(str(folder / "tokenizer.json"))
    tokenizer = Base("mine", folder).tokenizer()
    assert tokenizer.decode(tokenizer.encode("a b")) == "ab"


@pytest.mark.parametrize("begin", ["<s>", "<bos>"])
def test_a_sentencepiece_vocabulary_is_taken(tmp_path, begin):
    folder = tmp_path / "model"
    special = {"<s>": ["<unk>", "<s>", "</s>"], "<bos>": ["<pad>", "<eos>", "<bos>", "<unk>"]}[begin]
    write_sentencepiece(
        folder,
        **(
            {}
            if begin == "<s>"
            else {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
        ),
    )
    write_fast_sentencepiece(folder, special, begin)
    name_class(folder, "LlamaTokenizerFast" if begin == "<s>" else "GemmaTokenizerFast")
    assert Base("mine", folder).tokenizer()("a b", add_special_tokens=False)["input_ids"]
