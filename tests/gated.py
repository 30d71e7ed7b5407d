"""A gated MLP between its large products, as autograd sees it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from olpack.train.ops.low_rank import MlpLowRank


def gated_mlp(
    function: Callable, gated: torch.Tensor, upped: torch.Tensor, dmiddle: torch.Tensor, adapters: MlpLowRank, dlow: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """((middle, low), gradients of gated, upped and the members of `adapters`), in float32."""
    gated, upped, h, gate_b, up_b, down_a = (each.detach().float().requires_grad_() for each in (gated, upped, *adapters))
    rank = gate_b.shape[1]
    middle = function(gated + h[:, :rank] @ gate_b.T) * (upped + h[:, rank:] @ up_b.T)
    low = middle @ down_a.T
    found = torch.autograd.grad((middle, low), (gated, upped, h, gate_b, up_b, down_a), (dmiddle.float(), dlow.float()))
    return (middle.detach(), low.detach()), found
