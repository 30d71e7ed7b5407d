"""Small GGUF files for the tests of the deploy room: a whole header with a real byte-level vocabulary and a chat template, and one
tensor.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
CHAT = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking %}{{ '<think>\\n' }}{%- endif %}{%- endif %}"
)


def tokenizer() -> Tokenizer:
    """All bytes, the special tokens and one merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({piece: number for number, piece in enumerate([*SPECIAL, *alphabet, "de"])}, [("d", "e")]))
    made.add_special_tokens(SPECIAL)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def write(path: Path, chat_template: str | None, file_type: int = 15, filling: float = 0.0, add_bos: bool = False, bos: bool = True) -> str:
    """A GGUF of about 150 kB. Returns its SHA-256 as 64 hexadecimal digits."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(2048)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_file_type(file_type)
    pieces = sorted(tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_types([3 if piece in SPECIAL else 1 for piece, _ in pieces])
    writer.add_token_merges(["d e"])
    writer.add_eos_token_id(2)
    if bos:
        writer.add_bos_token_id(3)
    writer.add_add_bos_token(add_bos)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    writer.add_tensor("token_embd.weight", np.full((len(pieces), 128), filling, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hashlib.sha256(path.read_bytes()).hexdigest()
