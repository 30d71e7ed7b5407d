"""Cross-entropy of a packed batch from its last hidden states, with the output layer applied to a chunk of target tokens at a time.

All logits of 16,384 tokens and a vocabulary of 128,256 would be 8 GB in float32. The output layer is frozen, so the gradient of the hidden states
is known as soon as a chunk's logits are, and the logits need not be saved.
"""

from __future__ import annotations

import torch

from olpack.train.ops import pointwise
from olpack.train.ops.limits import tokens_at_once


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed negative log-probability, in nats, of targets after hidden states [tokens, size], whose gradient takes their place."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap):
        hidden = hidden.detach()
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        step = tokens_at_once(len(hidden), weight.shape[0])
        for start in range(0, len(hidden), step):
            chunk = slice(start, start + step)
            logits = hidden[chunk] @ weight.T if bias is None else torch.addmm(bias, hidden[chunk], weight.T)
            losses, gradient = pointwise.loss(logits, targets[chunk], softcap or 0.0)
            total += losses.sum()
            if ctx.needs_input_grad[0]:
                torch.mm(gradient, weight, out=hidden[chunk])  # these hidden states are used up
        ctx.save_for_backward(hidden)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Negative log-probability of the targets summed, float32, in nats.

    Args:
        hidden: [tokens, size], from which the targets are predicted. Overwritten.
        weight, bias: of the frozen output layer, [vocabulary, size] and [vocabulary].
        targets: int64 [tokens].
        softcap: of the final logits, or None.
    """
    return _ChunkedCrossEntropy.apply(hidden.to(weight.dtype), weight, bias, targets, softcap)
