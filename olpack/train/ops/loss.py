"""The loss of a flat row from its last hidden states, with the output head applied to a few target tokens at a time.

All logits of 16,384 tokens and 128,256 words would be 8 GB in float32. The head is frozen, so the gradient of the hidden states is known as
soon as a piece's logits are, and the logits need not be kept.
"""

from __future__ import annotations

import torch

from olpack.train.ops import pointwise

PIECE = 2**26  # logits of one piece at most
_TILE = 256  # tokens that a product takes at once on a GPU: a few more would cost as much as so many
_PIECES = 8  # of few tokens, whose logits would take more memory than the rest of their step


def tokens_at_once(tokens: int, words: int) -> int:
    """How many tokens' logits are made at once."""
    step, few = max(1, PIECE // words), tokens // _PIECES
    return min(step - step % _TILE, max(_TILE, few - few % _TILE)) if step > _TILE else step


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
