"""The order of rows in training, and their packing into batches: end to end, with no padding, or padded to one of few sizes."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F

from olpack.data import TokenRow
from olpack.train.ops.limits import UNCOUNTED


def schedule(count: int, epochs: float, batch_size: int, seed: int) -> list[list[int]]:
    """Row indices of every optimizer step: each epoch is a new permutation, a fraction of an epoch is its beginning.

    Depends on the arguments alone, so a resumed run sees the same rows in the same steps.
    """
    order: list[int] = []
    epoch = 0
    while len(order) < round(count * epochs):
        permutation = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(permutation)
        order += permutation
        epoch += 1
    order = order[: max(1, round(count * epochs))]
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def micro_batches(rows: list[TokenRow], budget: int) -> list[list[TokenRow]]:
    """Split rows into as few groups as best fit finds, each of at most `budget` tokens: the longest first, each into the fullest group
    that still takes it.

    A row that is longer than the budget makes a group of its own.
    """
    groups: list[list[TokenRow]] = []
    free: list[tuple[int, int]] = []  # (tokens left, group), ascending
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        at = bisect_left(free, (len(row.ids), 0))
        if at < len(free):
            left, number = free.pop(at)
        else:
            left, number = budget, len(groups)
            groups.append([])
        groups[number].append(row)
        insort(free, (left - len(row.ids), number))
    return groups


def by_length(rows: Iterable[Sequence[int]], budget: int) -> Iterator[list[Sequence[int]]]:
    """Rows of token ids in groups of similar lengths, each of at most `budget` tokens once they are padded. A longer row makes a group of its own."""
    group: list[Sequence[int]] = []
    for row in sorted(rows, key=len):
        if group and len(row) * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, int64; which are of a row, bool), both [rows, tokens of the longest]. What is behind a row changes nothing in it."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
    lengths = torch.tensor([[len(row)] for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths).to(device)


@dataclass(frozen=True)
class PackedBatch:
    """Samples end to end, in one row.

    Attributes:
        ids: int64 [1, tokens].
        positions: int64 [1, tokens], of each token in its own sample, from 0.
        starts: int32 [samples + 1], where each sample begins, and the end.
        longest: tokens of the longest sample.
        before: int64 [targets], places of the tokens from which a target token is predicted.
        targets: int64 [targets], ids of the target tokens; `UNCOUNTED` adds nothing to the loss.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    longest: int
    before: torch.Tensor
    targets: torch.Tensor


def pack(rows: list[TokenRow], device: torch.device) -> PackedBatch:
    """Rows as one batch on a device. The first token of a sample is predicted from nothing, so it is never a target."""
    # By way of numpy, which reads Python's numbers ten times faster.
    ids = torch.from_numpy(np.fromiter(chain.from_iterable(row.ids for row in rows), np.int64))
    loss_mask = torch.from_numpy(np.fromiter(chain.from_iterable(row.loss_mask for row in rows), bool))
    lengths = torch.tensor([len(row.ids) for row in rows])
    starts = F.pad(lengths.cumsum(0), (1, 0))
    loss_mask[starts[:-1]] = False
    places = loss_mask.nonzero()[:, 0]
    tensors = {
        "ids": ids[None],
        "positions": (torch.arange(len(ids)) - starts[:-1].repeat_interleave(lengths))[None],
        "starts": starts.int(),
        "before": places - 1,
        "targets": ids[places],
    }
    if device.type == "cuda":  # from pinned memory the copies do not wait for the GPU
        tensors = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    return PackedBatch(**tensors, longest=int(lengths.max()))


@dataclass(frozen=True)
class Form:
    """The sizes of a batch that is padded: tokens, samples and targets. Few forms take all batches of a run."""

    tokens: int
    samples: int
    targets: int

    @classmethod
    def of(cls, rows: list[TokenRow]) -> Form:
        """The smallest that takes these rows: tokens in steps of an eighth, targets in quarters of the tokens, samples a power of two."""
        tokens = sum(len(row.ids) for row in rows)
        step = max(8, (1 << tokens.bit_length()) // 16)
        tokens = -(-tokens // step) * step
        quarters = -(-4 * sum(row.target_count for row in rows) // tokens)
        return cls(tokens, 1 << len(rows).bit_length(), max(1, quarters) * tokens // 4)


def pad(batch: PackedBatch, form: Form) -> PackedBatch:
    """A batch of a form that gives the same loss: tokens that belong to no row are a sample of their own, and no target."""
    more = form.tokens - batch.ids.shape[1]
    places = torch.arange(form.tokens, device=batch.ids.device)
    return PackedBatch(
        ids=F.pad(batch.ids, (0, more)),
        positions=torch.cat([batch.positions, places[None, :more]], dim=1),
        starts=F.pad(batch.starts, (0, form.samples + 1 - len(batch.starts)), value=form.tokens),
        longest=form.tokens,
        before=torch.cat([batch.before, places[: form.targets - len(batch.before)]]),
        targets=F.pad(batch.targets, (0, form.targets - len(batch.targets)), value=UNCOUNTED),
    )
