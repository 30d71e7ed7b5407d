"""Sizes that the functions of `olpack.train.ops` and the memory estimate have in common. Imports no torch."""

from __future__ import annotations

UNCOUNTED = -1  # in place of a target that adds nothing to the loss
CHUNK_LOGITS = 2**26  # logits that the chunked cross-entropy makes at once, at most
SLOTS = 3  # streamed layers that are on the GPU at once: the one that computes, and two on their way
_TILE = 256  # tokens that a matrix product on a GPU computes at once: one token more costs as much as another tile
_CHUNKS = 8  # of a short micro-batch, whose logits would otherwise take more memory than the rest of its step


def tokens_at_once(tokens: int, vocabulary: int) -> int:
    """Number of tokens whose logits the chunked cross-entropy makes at once."""
    most, share = max(1, CHUNK_LOGITS // vocabulary), tokens // _CHUNKS
    return min(most - most % _TILE, max(_TILE, share - share % _TILE)) if most > _TILE else most
