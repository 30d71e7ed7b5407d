"""Causal attention over a packed batch, in which no sample sees another.

Registered with transformers under `NAME`; every model whose attention goes through its interface can use it. The samples' bounds come as
`cu_seq_lens_q` and `max_length_q`, the arguments that transformers passes down for this.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F

from olpack.train.ops.activation_checkpointing import once

NAME = "olpack_packed"


@functools.cache
def register() -> None:
    """Register `NAME` with transformers as an attention and as a mask (there is none: the bounds suffice)."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: [1, heads, tokens, size]; key and value: [1, key heads, tokens, size].
        sliding_window: a token sees itself and so many tokens before it, less one; None: all before it.
        softcap: scores are squashed into (-softcap, softcap) by tanh; None: they are not.
        cu_seq_lens_q: int32 [samples + 1], where each sample begins, and the end.
        max_length_q: tokens of the longest sample.

    Returns:
        ([1, tokens, heads, size], None)

    Raises:
        NotImplementedError: attention sinks.
        ValueError: the model does not pass the bounds on.
    """
    if s_aux is not None:
        raise NotImplementedError("attention sinks")
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("it does not pass the bounds of samples on to its attention")
    query, key, value = (states.transpose(1, 2)[0] for states in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None and has_kernel(query):
        mixed = _Flash.apply(query, key, value, cu_seq_lens_q, max_length_q, scaling, -1 if sliding_window is None else sliding_window - 1)
    else:
        bounds = cu_seq_lens_q.tolist()
        samples = [(query[start:end], key[start:end], value[start:end]) for start, end in itertools.pairwise(bounds) if start < end]
        mixed = torch.cat([_of_one_sample(*sample, scaling, sliding_window, softcap) for sample in samples])
    return mixed[None], None


def has_kernel(states: torch.Tensor) -> bool:
    """Whether torch's variable-length flash attention takes these states [tokens, heads, size]."""
    if not states.is_cuda or states.dtype not in (torch.bfloat16, torch.float16) or states.shape[-1] > 256 or states.shape[-1] % 8:
        return False
    return _works(states.device, states.dtype)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash attention runs there, forward and back."""
    states, bounds = torch.ones(2, 1, 8, device=device, dtype=dtype, requires_grad=True), torch.tensor([0, 2], dtype=torch.int32, device=device)
    try:
        with torch.enable_grad():
            _Flash.apply(states, states, states, bounds, 2, 1.0, -1).sum().backward()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # a torch without it, or with another form of it; an older GPU
        return False
    return True


class _Flash(torch.autograd.Function):
    """Variable-length flash attention, whose output is not computed again with checkpointing. `torch.nn.attention.varlen` has the same, without
    a way to pass it a saved output."""

    @staticmethod
    def forward(ctx, query, key, value, bounds, longest, scaling, left):
        ctx.bounds = bounds, bounds, longest, longest, 0.0, left == -1
        ctx.window = {"scale": scaling, "window_size_left": left, "window_size_right": 0}
        mixed, sums = once(lambda: torch.ops.aten._flash_attention_forward(query, key, value, *ctx.bounds, False, **ctx.window)[:2])
        ctx.save_for_backward(query, key, value, mixed, sums)
        return mixed

    @staticmethod
    def backward(ctx, gradient):
        unused = torch.zeros(2, dtype=torch.uint64, device=gradient.device)  # of dropout
        return *torch.ops.aten._flash_attention_backward(gradient, *ctx.saved_tensors, *ctx.bounds, unused, unused, **ctx.window), *[None] * 4


def _of_one_sample(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Attention within one sample; arguments and output are [tokens, heads, size]."""
    tokens, repeat = len(query), query.shape[1] // key.shape[1]
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))
    key, value = (states.repeat_interleave(repeat, 0) if repeat > 1 else states for states in (key, value))
    if softcap is None:
        mask = _visible(tokens, window, query.device) if window is not None and window < tokens else None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling).transpose(0, 1)
    scores = torch.tanh(query @ key.transpose(1, 2) * (scaling / softcap)) * softcap
    scores = scores.masked_fill(~_visible(tokens, window, query.device), float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(0, 1)


def _visible(tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Whether a token (row) sees another (column): bool [tokens, tokens]."""
    place = torch.arange(tokens, device=device)
    back = place[:, None] - place
    return (back >= 0) & (back < (window or tokens))
