"""The stacked experts of a GGUF, in the blocks of the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from olpack.model.gguf_blocks import BlockType
from olpack.train.ops.blocks import dequantize


class BlockExperts(nn.Module):
    """The experts of a layer, of which a pass dequantizes one after the other: those that some token chose.

    Args:
        plain: the module of transformers in whose place it goes; its parameters are not used, its gate and its biases are.
        stacks: "gate", "up", "down" to (type of the blocks; experts, rows, columns); "gate_up" where one stack has the rows of both.
        dtype: that it computes in.
    """

    def __init__(self, plain: Any, stacks: Mapping[str, tuple[BlockType, tuple[int, ...]]], dtype: torch.dtype):
        super().__init__()
        self.num_experts, self.compute_dtype = plain.num_experts, dtype
        self.concatenated, self.apply_gate = plain.is_concatenated, plain._apply_gate
        self.types = {name: type_ for name, (type_, _) in stacks.items()}
        for name, (type_, (experts, rows, columns)) in stacks.items():
            self.register_buffer(name, torch.empty(experts, rows, type_.row_bytes(columns), dtype=torch.uint8, device="meta"))
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            self.register_parameter(name, plain._parameters.get(name))
        self._is_hf_initialized = True

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """[tokens, size], the sum of what the chosen experts give for each token.

        Args:
            hidden_states: [tokens, size].
            top_k_index, top_k_weights: [tokens, experts of a token], their numbers and their shares.
        """
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # stands for none
                continue
            token, place = torch.where(top_k_index == expert)
            x = hidden_states[token].to(self.compute_dtype)
            both = self._biased(self._gate_and_up(x, expert), "gate_up_proj_bias", expert)
            out = self._biased(self._product(self.apply_gate(both), "down", expert), "down_proj_bias", expert)
            result.index_add_(0, token, (out * top_k_weights[token, place, None]).to(result.dtype))
        return result

    def _gate_and_up(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        if "gate_up" in self.types:
            return self._product(x, "gate_up", expert)
        gate, up = self._product(x, "gate", expert), self._product(x, "up", expert)
        return torch.cat((gate, up), -1) if self.concatenated else torch.stack((gate, up), -1).flatten(-2)

    def _biased(self, products: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        bias = self._parameters[name]
        return products if bias is None else products + bias[expert]

    def _product(self, x: torch.Tensor, stack: str, expert: int) -> torch.Tensor:
        return _Product.apply(x, self.types[stack], self.get_buffer(stack)[expert])


class _Product(torch.autograd.Function):
    """x @ W.T for W in blocks, which is dequantized again in the backward pass."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, type_: BlockType, blocks: torch.Tensor) -> torch.Tensor:
        context.type, context.blocks = type_, blocks
        return F.linear(x, dequantize(type_, blocks, x.dtype))

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ dequantize(context.type, context.blocks, gradient.dtype), None, None
