"""The order of rows in training, and how they are put together for the model: end to end in one flat row, with no padding."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F

from olpack.data import TokenRow


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
    room: list[tuple[int, int]] = []  # (tokens left, group), ascending
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        at = bisect_left(room, (len(row.ids), 0))
        if at < len(room):
            left, number = room.pop(at)
        else:
            left, number = budget, len(groups)
            groups.append([])
        groups[number].append(row)
        insort(room, (left - len(row.ids), number))
    return groups


@dataclass(frozen=True)
class FlatRow:
    """Samples end to end.

    Attributes:
        ids: int64 [1, tokens].
        positions: int64 [1, tokens], of each token in its own sample, from 0.
        starts: int32 [samples + 1], where each sample begins, and the end.
        longest: tokens of the longest sample.
        before: int64 [targets], places of the tokens from which a target token is predicted.
        targets: int64 [targets], ids of the target tokens.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    longest: int
    before: torch.Tensor
    targets: torch.Tensor


def flatten(rows: list[TokenRow], device: torch.device) -> FlatRow:
    """Rows as one flat row on a device. The first token of a sample is predicted from nothing, so it is never a target."""
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
    return FlatRow(**tensors, longest=int(lengths.max()))
