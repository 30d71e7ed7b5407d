"""The order in which rows are learned, and how they are put together for the model."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

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


def micro_batches(rows: list[TokenRow], budget: int) -> Iterator[list[TokenRow]]:
    """Split rows into groups of similar length whose padded size, rows × longest, stays within `budget` tokens.

    A row that is longer than the budget makes a group of its own.
    """
    group: list[TokenRow] = []
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        if group and len(group[0].ids) * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def collate(rows: list[TokenRow], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both int64 [rows, longest]; labels are -100 where nothing is learned.

    Padding is on the right. Under causal attention no token sees what comes after it, so the model needs no attention mask
    and takes its fast path; what it computes for the padding is never read.
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), -100, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens = torch.tensor(row.ids)
        ids[index, : len(tokens)] = tokens
        learned = torch.tensor(row.learned)
        labels[index, : len(tokens)][learned] = tokens[learned]
    return ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)
