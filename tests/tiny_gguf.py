"""A random Qwen3 with a byte-level BPE tokenizer, as a transformers model and, without our exporter, as a GGUF of the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TEXT = [
    "def add(a, b):\n    return a + b\n",
    "Write a function that reverses a list.",
    "naïve café — 日本語 🙂",
    "for item in range(10): print(item)",
]


def tokenizer() -> Tokenizer:
    """All 256 bytes, some merges, three special tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        _TEXT * 3,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    return made


def model(vocabulary: int, seed: int = 0) -> Qwen3ForCausalLM:
    """Weights large enough that the next token is far from uniform."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=False,
        rope_theta=10000.0,
    )
    return Qwen3ForCausalLM(config).eval().float()


def parrot(vocabulary: int, token: int) -> Qwen3ForCausalLM:
    """A model that says `token` after whatever it reads."""
    made = model(vocabulary)
    with torch.no_grad():
        made.model.embed_tokens.weight.fill_(1)
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        made.lm_head.weight.zero_()
        made.lm_head.weight[token] = 1
    return made


def write(path: Path, made: Qwen3ForCausalLM, vocabulary: Tokenizer, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
    """The same weights as a GGUF; matrices in `kind`, vectors in float32."""
    config = made.config
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    by_id = sorted(vocabulary.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([text for text, _ in by_id])
    writer.add_token_types([gguf.TokenType.CONTROL if text in SPECIAL else gguf.TokenType.NORMAL for text, _ in by_id])
    merges = json.loads(vocabulary.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(vocabulary.token_to_id("<|im_end|>"))
    writer.add_bos_token_id(vocabulary.token_to_id("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for name, tensor in made.state_dict().items():
        data = tensor.numpy()
        quantized = kind if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), gguf.quants.quantize(data, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
