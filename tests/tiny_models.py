"""Small model folders with random weights, as Hugging Face would hold them: real configuration, real tokenizer, safetensors."""

from __future__ import annotations

import atexit
import functools
import json
from pathlib import Path

from olpack.export.client import Converter

QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

_TEXT = [
    "def add(a, b):\n    return a + b\n",
    "It's 2024, isn't it? We'll see.",
    "class Stack:\n    items = [1, 22, 333]\n",
    "for i in range(10):\n    print(i)\n",
    "Wörter, слова, 单词 und mehr.",
]


def write_tokenizer(folder: Path, *, pattern: str = QWEN2, vocabulary: int = 512, ignore_merges: bool = False) -> None:
    """A byte-level BPE tokenizer, trained on a few lines."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
}


def write_model(
    folder: Path,
    model_type: str = "qwen3",
    *,
    dtype: str = "bfloat16",
    tied: bool = True,
    shard: str = "1GB",
    seed: int = 0,
    **settings: object,
) -> Path:
    """A model of two layers and its tokenizer.

    Args:
        folder: made here.
        model_type: as transformers names it.
        dtype: of the stored weights.
        tied: one matrix as embedding and as output layer.
        shard: largest file, as `save_pretrained` takes it.
        seed: of the weights.
        settings: further fields of the configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    llama3 = model_type == "llama"
    write_tokenizer(folder, pattern=LLAMA3 if llama3 else QWEN2, ignore_merges=llama3)
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 512,
            **_SIZES,
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
            **settings,
        },
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def write_vision_model(folder: Path, *, dtype: str = "float32") -> Path:
    """A Gemma 3 that sees: a text model of two layers and a vision tower whose layers have the same names, with tied embeddings."""
    import torch
    from tokenizers import Tokenizer
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    write_tokenizer(folder)
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()  # the converter cuts the embedding to it
    text = {
        "vocab_size": size,
        **_SIZES,
        "sliding_window": 128,
        "query_pre_attn_scalar": 64,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    vision = {"hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=size - 1,
        boi_token_index=size - 2,
        eoi_token_index=size - 3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def write_adapter(folder: Path, model: Path, *, seed: int = 1, vera: bool = False, **settings: object) -> Path:
    """A LoRA or VeRA adapter of rank 4 on all linear layers whose B is not zero, so that it changes something."""
    import torch
    from peft import LoraConfig, VeraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    scaled = {} if vera else {"lora_alpha": 8}
    adapted = get_peft_model(
        base, (VeraConfig if vera else LoraConfig)(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **scaled, **settings})
    )
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    adapted.save_pretrained(folder)
    return folder


@functools.cache
def converter() -> Converter:
    """One worker for all tests: its start takes some seconds."""
    started = Converter()
    atexit.register(started.__exit__)
    return started


def write_sentencepiece(folder: Path, vocabulary: int = 400, **trainer: object) -> None:
    """A SentencePiece vocabulary in place of the byte-level one, as Gemma, Mistral and Phi-3 have it.

    Args:
        trainer: further settings of SentencePiece's trainer.
    """
    import sentencepiece

    folder.mkdir(exist_ok=True)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(_TEXT * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocabulary,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, **trainer},
    )
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_fast_sentencepiece(folder: Path, special: list[str], begin: str = "<s>") -> int:
    """The tokenizer.json that belongs to a folder's tokenizer.model, with `special` as special tokens. Returns the number of its tokens."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocabulary = {pieces.id_to_piece(number): number for number in range(pieces.get_piece_size())}
    pairs = [(number, piece[:at], piece[at:]) for piece, number in vocabulary.items() for at in range(1, len(piece))]
    merges = [pair for _, *pair in sorted(pairs) if vocabulary.keys() >= set(pair)]
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(pair) for pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if begin == "<s>" else spaces)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])])
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(vocabulary)
