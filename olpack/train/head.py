"""The loss of a flat row from its last hidden states, with the output head applied to a few learned tokens at a time.

All logits of 16,384 tokens and 128,256 words would be 8 GB in float32. The head is frozen, so the gradient of the hidden states is known as
soon as a piece's logits are, and the logits need not be kept.
"""

from __future__ import annotations

import torch

from olpack.train.pointwise import loss_of

PIECE = 2**26  # logits of one piece
_TILE = 256  # tokens that a product takes at once on a GPU: a few more would cost as much as so many


class _HeadLoss(torch.autograd.Function):
    """Summed negative log-probability, in nats, of targets after hidden states [tokens, size]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap):
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        step = max(1, PIECE // weight.shape[0])
        step -= step % _TILE if step > _TILE else 0
        for start in range(0, len(hidden), step):
            piece = slice(start, start + step)
            logits = hidden[piece] @ weight.T if bias is None else torch.addmm(bias, hidden[piece], weight.T)
            losses, slope = loss_of(logits, targets[piece], softcap)
            total += losses.sum()
            if gradient is not None:
                torch.mm(slope, weight, out=gradient[piece])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


def head_loss(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Negative log-probability of the targets summed, float32, in nats.

    Args:
        hidden: [tokens, size], from which the targets are predicted.
        head: the frozen output layer.
        targets: int64 [tokens].
        softcap: of the final logits, or None.
    """
    return _HeadLoss.apply(hidden.to(head.weight.dtype), head.weight, head.bias, targets, softcap)
