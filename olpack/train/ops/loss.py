"""The loss of a flat row from its last hidden states, with the output head applied to a few target tokens at a time.

All logits of 16,384 tokens and 128,256 words would be 8 GB in float32. The head is frozen, so the gradient of the hidden states is known as
soon as a piece's logits are, and the logits need not be kept.
"""

from __future__ import annotations

import torch

from olpack.train.ops import pointwise
from olpack.train.ops.limits import tokens_at_once


class _HeadLoss(torch.autograd.Function):
    """Summed negative log-probability, in nats, of targets after hidden states [tokens, size], whose gradient takes their place."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap):
        hidden = hidden.detach()
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        step = tokens_at_once(len(hidden), weight.shape[0])
        for start in range(0, len(hidden), step):
            piece = slice(start, start + step)
            logits = hidden[piece] @ weight.T if bias is None else torch.addmm(bias, hidden[piece], weight.T)
            losses, slope = pointwise.loss(logits, targets[piece], softcap or 0.0)
            total += losses.sum()
            if ctx.needs_input_grad[0]:
                torch.mm(slope, weight, out=hidden[piece])  # which have done their work
        ctx.save_for_backward(hidden)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Negative log-probability of the targets summed, float32, in nats.

    Args:
        hidden: [tokens, size], from which the targets are predicted. Of no use afterwards.
        weight, bias: of the frozen output layer, [vocabulary, size] and [vocabulary].
        targets: int64 [tokens].
        softcap: of the final logits, or None.
    """
    return _HeadLoss.apply(hidden.to(weight.dtype), weight, bias, targets, softcap)
