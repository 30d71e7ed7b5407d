"""From a recipe's data files to rows that a base can learn."""

from __future__ import annotations

from pathlib import Path

from olpack import progress
from olpack.data.chats import load_chats, split
from olpack.data.render import Renderer
from olpack.data.rows import TokenRow
from olpack.errors import OlpackError


def load_rows(train: Path, held_out: Path | None, renderer: Renderer, *, max_length: int, eval_share: float) -> tuple[list[TokenRow], list[TokenRow]]:
    """Read both sides of the data and render them.

    Args:
        train: JSONL of chats to learn.
        held_out: JSONL of chats to score; None: `eval_share` of the training chats is set apart.
        renderer: with the base's tokenizer and chat template.
        max_length: longest row in tokens.

    Returns:
        (train, eval) rows in the order of their files.

    Raises:
        OlpackError: a file or a row is wrong, a row is too long, or nothing is left on one side.
    """
    chats = load_chats(train)
    if held_out is None:
        chats, apart = split(chats, eval_share)
        if not chats or not apart:
            raise OlpackError(f"{train} has too few rows to set {eval_share:.0%} of them apart.", "Name a file of held-out rows as `data.eval`.")
    else:
        apart = load_chats(held_out)
    sides: list[list[TokenRow]] = []
    with progress.task("reading the data", total=len(chats) + len(apart), unit="rows") as task:
        for side in (chats, apart):
            sides.append([])
            for chat in side:
                sides[-1].append(renderer.row(chat))
                task.advance()
    _refuse_long(sides[0] + sides[1], max_length)
    return sides[0], sides[1]


def _refuse_long(rows: list[TokenRow], limit: int) -> None:
    if long := [row for row in rows if len(row.ids) > limit]:
        worst = max(long, key=lambda row: len(row.ids))
        count = "1 row is" if len(long) == 1 else f"{len(long)} rows are"
        raise OlpackError(f"{count} longer than {limit} tokens; {worst.source} has {len(worst.ids)}.",
                          "Shorten or remove them, or raise `data.max_length` up to the base's context.")
