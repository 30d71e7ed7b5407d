"""From a recipe's data to rows that a base can be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from olpack import progress
from olpack.data.chats import leaks, load_chats, refuse, split, times, unread_keys
from olpack.data.reasoning_marks import stray_mark
from olpack.data.render import Renderer
from olpack.data.rows import Chat, TokenRow
from olpack.data.sources import Source
from olpack.errors import OlpackError


def load_split(train: Sequence[Source | Path], *, eval_share: float) -> tuple[list[Chat], list[Chat]]:
    """Read the training chats and set a share of them apart for evaluation.

    Args:
        train: sources of training chats. Chats that their weight leaves out are among the result.
        eval_share: from 0 to 1.

    Returns:
        (train, eval) chats in the order of their files.

    Raises:
        OlpackError: a file or a row is wrong, or nothing is left on one side.
    """
    chats, apart = split(load_chats(*train), eval_share)
    if not chats or not apart:
        names = ", ".join(
            str(source if isinstance(source, Path) else source.place if isinstance(source.place, Path) else source.label) for source in train
        )
        raise OlpackError(f"{names} has too few rows to set {eval_share:.0%} of them apart.", "Name a file of held-out rows as `data.eval`.")
    return chats, apart


def render_rows(chats: Sequence[Chat], held_out: Sequence[Chat], renderer: Renderer, *, max_length: int) -> tuple[list[TokenRow], list[TokenRow]]:
    """Render both sides of the data.

    Args:
        chats: training chats; none for an adapter that is trained already. The weight of a chat decides how often its rows stand in the result.
        held_out: chats to score, each once.
        renderer: with the base's tokenizer and chat template.
        max_length: longest row in tokens.

    Returns:
        (train, eval) rows in the order of the chats. A chat of which the template rewrites earlier turns makes several.

    Raises:
        OlpackError: the template refuses a chat, a row is too long or is on both sides, or the weights leave no training row.
    """
    for chat, twin in leaks(chats, held_out):
        raise OlpackError(
            f"{chat.source} is also in the training data ({twin.source}), so its score would mean nothing.", "Remove it from one of the files."
        )
    if not (trained := [chat for chat in chats if times(chat)]) and chats:
        raise OlpackError("The training data has no row left at this weight.", "Raise `weight`.")
    for sentence in unread_keys([*chats, *held_out], str(renderer.tokenizer.chat_template)):
        progress.say(sentence)
    with progress.task("reading the data", total=len(trained) + len(held_out), unit="rows") as task:
        made = _rendered([*trained, *held_out], renderer, task)
    _refuse_long([row for rows in made for row in rows], max_length)
    if parted := sum(len(rows) > 1 for rows in made):
        progress.say(f"{parted:,} of {len(made):,} chats become several rows each: the chat template writes earlier turns otherwise than the last")
    if stray := [row for rows in made for row in rows if stray_mark(row, renderer)]:
        progress.warn(
            f"{stray[0].source}: {stray_mark(stray[0], renderer)} This is so of {len(stray):,} {'row' if len(stray) == 1 else 'rows'}; "
            "`olpack data check` names all of them."
        )
    seen = [rows for chat, rows in zip(trained, made, strict=False) for _ in range(times(chat))]
    return [row for rows in seen for row in rows], [row for rows in made[len(trained) :] for row in rows]


def nth_row(number: int, train: Sequence[Source], other: Sequence[Source], renderer: Renderer, *, held_out: bool, eval_share: float) -> TokenRow:
    """One row as the model sees it, counted from 1 in the order of the files; none behind it is rendered.

    Args:
        number: which row; of a chat that makes several, each counts.
        train, other: sources of training chats, and of held-out chats; empty: `eval_share` of the training chats is held out, 0 holds out none.
        renderer: with the base's tokenizer and chat template.
        held_out: count the held-out rows, not the training rows.

    Raises:
        OlpackError: the data is wrong, or there are fewer rows.
    """
    if held_out and other:
        chats = load_chats(*other)
    else:
        chats = load_chats(*train)
        chats = chats if other else split(chats, eval_share)[held_out]
    seen = 0
    for rows in renderer.batches(chats):
        if isinstance(rows, OlpackError):
            raise rows
        if seen + len(rows) >= number:
            return rows[number - seen - 1]
        seen += len(rows)
    raise OlpackError(f"There is no row {number}: the {'held-out' if held_out else 'training'} side has {seen:,}.")


def _rendered(chats: list[Chat], renderer: Renderer, task: progress.ProgressTask) -> list[list[TokenRow]]:
    made: list[list[TokenRow]] = []
    refused: list[OlpackError] = []
    for rows in renderer.batches(chats):
        if isinstance(rows, OlpackError):
            refused.append(rows)
        else:
            made.append(rows)
        task.advance()
    if refused:
        refuse([error.problem for error in refused], refused[0].remedy)
    return made


def _refuse_long(rows: list[TokenRow], limit: int) -> None:
    if long := [row for row in rows if len(row.ids) > limit]:
        worst = max(long, key=lambda row: len(row.ids))
        count = "1 row is" if len(long) == 1 else f"{len(long)} rows are"
        raise OlpackError(
            f"{count} longer than {limit} tokens; {worst.source} has {len(worst.ids)}.",
            "Shorten or remove them, or raise `data.max_length` up to the base's context.",
        )
