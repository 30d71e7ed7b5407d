"""The low-rank products of a gated MLP's adapters, as the kernels and the plain functions take them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class MlpLowRank(NamedTuple):
    """What the adapters of a gated MLP add.

    Attributes:
        h: [tokens, 2 · rank], the input times the gate's A and times up's.
        gate_b, up_b: [columns, rank], scaled.
        down_a: [rank, columns].
    """

    h: torch.Tensor
    gate_b: torch.Tensor
    up_b: torch.Tensor
    down_a: torch.Tensor

    @property
    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """h of gate and of up."""
        return self.h[:, : self.gate_b.shape[1]], self.h[:, self.gate_b.shape[1] :]


class Gradients(NamedTuple):
    """Of a gated MLP's adapters: those of the members of `MlpLowRank` (so of the scaled B), of B and A in float32."""

    h: torch.Tensor
    gate_b: torch.Tensor
    up_b: torch.Tensor
    down_a: torch.Tensor
