"""Regular expressions that others wrote, compared with names: each comparison ends in time."""

from __future__ import annotations

import regex

from olpack.errors import OlpackError

_SECONDS = 2  # for one comparison with a name


def search(pattern: str, name: str, setting: str, *, full: bool = False) -> bool:
    """Whether an expression matches a part of a name, or all of it.

    Args:
        setting: what contains the expression, for the error: "`export.tensor_types`".

    Raises:
        OlpackError: the comparison takes too long.
        regex.error: it is no regular expression.
    """
    try:
        return (regex.fullmatch if full else regex.search)(pattern, name, timeout=_SECONDS) is not None
    except TimeoutError:
        raise OlpackError(
            f"The expression '{pattern}' of {setting} takes more than {_SECONDS} s to compare with '{name}'.", "Write it without nested repetitions."
        ) from None
