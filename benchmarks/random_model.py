"""Models of any size with random weights, written as fast as the disk takes them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
_BLOCK = (1 << 24) + 1117  # random values that tensors are cut from; odd, so that no two rows are equal


def write_base(
    folder: Path,
    hidden: int,
    intermediate: int,
    layers: int,
    rows: int | None = None,
    vocabulary: Path | None = None,
    *,
    llama: bool = False,
    sparse: bool = False,
) -> int:
    """A model in bfloat16, one safetensors file for each layer. Returns its parameters.

    Args:
        folder: made here.
        hidden, intermediate, layers: the shape. Heads have 128 columns.
        rows: of embedding and output matrix; by default as many as the vocabulary needs.
        vocabulary: a GGUF whose vocabulary is used; by default tiny-coder's.
        llama: a Llama of 8 key-value heads instead of a Qwen3 in which four heads share one.
        sparse: leave the weights out: files with holes, which read as zeros.
    """
    folder.mkdir(parents=True)
    rows = max(write_vocabulary(folder, vocabulary), rows or 0)
    heads, head_dim = hidden // 128, 128
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "dtype": "bfloat16",
    }
    if llama:
        config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    keys = config["num_key_value_heads"] * head_dim
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_norm": (head_dim,),
        "self_attn.k_norm": (head_dim,),
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    if llama:
        del layer["self_attn.q_norm"], layer["self_attn.k_norm"]
    parts = [{"model.embed_tokens.weight": (rows, hidden)}, {"model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}]
    parts += [{f"model.layers.{i}.{name}.weight": size for name, size in layer.items()} for i in range(layers)]
    weights = None if sparse else _Weights()
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / name, part, weights)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(math.prod(size) for part in parts for size in part.values())


class _Weights:
    """Normal values in bfloat16: pieces of one block, in a few scales, each tensor from another place."""

    def __init__(self):
        import torch

        torch.manual_seed(0)
        block = torch.randn(_BLOCK)
        self._blocks = [memoryview((block * scale).bfloat16().view(torch.uint8).numpy()) for scale in (0.01, 0.02, 0.03)]
        self._tensors = 0

    def write(self, file, nbytes: int) -> None:
        block = self._blocks[self._tensors % len(self._blocks)]
        at = 2 * (self._tensors * 7919 % _BLOCK)
        self._tensors += 1
        while nbytes:
            piece = block[at : at + nbytes]
            file.write(piece)
            nbytes -= len(piece)
            at = 0


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], weights: _Weights | None) -> None:
    """One file of bfloat16 tensors; without weights, a hole in their place."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if weights is None:
            file.truncate(8 + len(text) + at)
        else:
            for shape in shapes.values():
                weights.write(file, 2 * math.prod(shape))


def write_vocabulary(folder: Path, vocabulary: Path | None) -> int:
    """The tokenizer's files; returns how many rows the embedding needs."""
    if vocabulary is None:
        source = REPOSITORY / "olpack" / "assets" / "tiny-coder"
        for file in source.glob("tokenizer*"):
            shutil.copy(file, folder)
        return json.loads((source / "config.json").read_text())["vocab_size"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(vocabulary.parent, gguf_file=vocabulary.name)
    tokenizer.save_pretrained(folder)
    return -(-len(tokenizer) // 256) * 256


def write_adapter(folder: Path, base: Path, rank: int = 16, *, zero: bool = False) -> None:
    """A LoRA adapter on every linear layer, made from the base's tensor headers; with `zero`, one that changes nothing."""
    import torch
    from safetensors.torch import save_file

    from olpack.model.checkpoint import read_tensor_headers

    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, header in read_tensor_headers(base).items():
        if name.endswith("_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, header.shape[1]) * 0.02
            tensors[f"{module}.lora_B.weight"] = torch.randn(header.shape[0], rank) * (0 if zero else 0.02)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "task_type": "CAUSAL_LM", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
