"""The tokenizer that is built from a GGUF makes llama.cpp's tokens: for every pre-tokenizer that is known, and for SentencePiece vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from olpack.deploy.prompt_identity import HARD
from olpack.errors import OlpackError
from olpack.llamacpp.vocabulary import Vocabulary
from olpack.model.base import load_tokenizer
from olpack.model.gguf_tokenizer import write_tokenizer
from olpack.model.pretokenizers import SPLITS

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [turn["content"] for turns in HARD.values() for turn in turns] + [
    "\n    1",
    "éCole ÉCOLE École iPhone XMLHttpRequest ǅ ªº ʰ",
    "a\u0301 e\u0308 नमस्ते ไทย বাংলা word\u0301s",
    "1234567 12 3,456.78 ²³ Ⅷ ٣٤٥ A1B22C333",
    "\n\n\n  \t x",
    "   ",
    "\t\t\n",
    "a  b   c    d\r\n\r\n\te ",
    "https://x.y/z?a=b&c=d#e //comment /* x */ ___ --- ......",
    "I'LL we've DON'T it's 's 'S 'Ré x'y'z '' ''ll",
    "日本語テスト。これは「括弧」です！ 漢字かなカナ 한국어 텍스트 你好，世界",
    "👩‍💻👨‍👩‍👧🏽🇩🇪 ☃️ ∑∫≠ €£¥ $x^2+y_1=\\frac{1}{2}$ ~`@#%&*",
    "\u00a0\u2003\u3000\u200b\ufeff x \u0085 y \u2028z",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|endoftext|> b",
    "АБВ абв Ёё ﬀ ﬁ Ａｂ １２３ שלום עולם، مرحبا Ünïcödé ßß ẞ İı",
]


def learned(vocabulary: int, *, bytes_as_text: bool) -> Tokenizer:
    """Merges over whole lines, also across spaces and digits, so that every split shows."""
    made = Tokenizer(models.BPE(byte_fallback=not bytes_as_text))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if bytes_as_text:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    corpus = TEXTS if bytes_as_text else [text.replace(" ", "▁") for text in TEXTS]
    extra = [] if bytes_as_text else [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[*SPECIAL, *extra], initial_alphabet=alphabet if bytes_as_text else [], show_progress=False
    )
    made.train_from_iterator(corpus * 3, trainer)
    return made


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return learned(900, bytes_as_text=True)


def write_vocabulary(path: Path, tokenizer: Tokenizer, pre: str | None, model: str = "gpt2", **flags: bool) -> Path:
    """A GGUF with keys and vocabulary alone."""
    import json

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(tokenizer.get_vocab_size())
    writer.add_context_length(512)
    tokens = [text for text, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    kinds = gguf.TokenType
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.CONTROL if text in SPECIAL else kinds.BYTE if text.startswith("<0x") else kinds.NORMAL for text in tokens])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def differing(path: Path, folder: Path, texts: Sequence[str] = TEXTS) -> list[str]:
    """Texts that the tokenizer built from a GGUF does not read as llama.cpp does."""
    folder.mkdir()
    write_tokenizer(path, folder)
    built = load_tokenizer(folder)
    with Vocabulary(path) as vocabulary:
        return [text for text in texts if built(text, add_special_tokens=False)["input_ids"] != vocabulary.tokenize(text)]


@pytest.mark.parametrize("pre", sorted(name for name, splits in SPLITS.items() if splits.bytes_as_text))
def test_every_pre_tokenizer_splits_as_llama_cpp_does(pre, byte_level, tmp_path):
    assert differing(write_vocabulary(tmp_path / "v.gguf", byte_level, pre), tmp_path / "built") == []


def test_the_pre_tokenizer_decides(byte_level, tmp_path):
    """The same vocabulary under another name gives other tokens, so the comparison above can fail."""
    names = ["gpt-2", "smollm", "qwen2", "llama-bpe", "deepseek-v3", "falcon"]
    seen = []
    for name in names:
        with Vocabulary(write_vocabulary(tmp_path / f"{name}.gguf", byte_level, name)) as vocabulary:
            seen.append([vocabulary.tokenize(text) for text in TEXTS])
    assert all(one != other for at, one in enumerate(seen) for other in seen[at + 1 :])


def test_a_file_without_a_name_is_read_as_the_default(byte_level, tmp_path):
    assert differing(write_vocabulary(tmp_path / "v.gguf", byte_level, None), tmp_path / "built") == []


@pytest.mark.parametrize(("model", "pre"), [("gemma4", "gemma4"), ("gpt2", "sarvam-moe")])
def test_merges_over_text_as_it_is(model, pre, tmp_path):
    path = write_vocabulary(tmp_path / "v.gguf", learned(900, bytes_as_text=False), pre, model)
    assert differing(path, tmp_path / "built") == []


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, tmp_path):
    """Scores in place of merges, as Llama 2, Mistral and Gemma have them; text that no token has becomes bytes."""
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("\n".join(text.replace("\n", " ") for text in TEXTS * 5), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    count = pieces.get_piece_size()
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_vocab_size(count)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(number) for number in range(count)])
    writer.add_token_scores([pieces.get_score(number) for number in range(count)])
    tests = ((pieces.is_unknown, 2), (pieces.is_control, 3), (pieces.is_byte, 6))
    kinds = [next((kind for is_one, kind in tests if is_one(number)), 4 if number in (3, 4) else 1) for number in range(count)]
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(prefix)
    assert differing(finish(writer, tmp_path / "v.gguf"), tmp_path / "built") == []
    built = load_tokenizer(tmp_path / "built")
    assert (built.bos_token, built.eos_token, built.unk_token) == ("<s>", "</s>", "<unk>")
    assert built("Hi")["input_ids"][0] == 1  # llama.cpp begins a text with it where a header does not forbid that
    assert built.decode(built("name  it\n now", add_special_tokens=False)["input_ids"]) == "name  it\n now"


@pytest.mark.parametrize(("flags", "around"), [({}, ("", "")), ({"add_bos_token": True, "add_eos_token": True}, (SPECIAL[0], SPECIAL[2]))])
def test_tokens_around_a_text_are_those_of_the_header(flags, around, byte_level, tmp_path):
    (tmp_path / "built").mkdir()
    write_tokenizer(write_vocabulary(tmp_path / "v.gguf", byte_level, "qwen2", **flags), tmp_path / "built")
    built = load_tokenizer(tmp_path / "built")
    first, last = around
    assert built.decode(built("a b")["input_ids"]) == f"{first}a b{last}"
    assert (built.bos_token, built.eos_token) == (SPECIAL[0], SPECIAL[2])
    assert not (tmp_path / "built/chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("pre", "model", "reason"),
    [("kimi-k2", "gpt2", "names the pre-tokenizer 'kimi-k2', whose split pattern olpack does not know"), (None, "bert", "of the kind WPM")],
)
def test_a_vocabulary_that_no_tokenizer_here_reads_is_refused(pre, model, reason, byte_level, tmp_path):
    with pytest.raises(OlpackError, match=reason):
        write_tokenizer(write_vocabulary(tmp_path / "v.gguf", byte_level, pre, model), tmp_path)
