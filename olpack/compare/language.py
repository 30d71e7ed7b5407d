"""Whether an answer is in another script than it should be: a model that has lost its language often falls into another alphabet."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

_FEWEST_LETTERS = 20  # of fewer nothing is said: names, symbols, one word of English
_DOMINANT = 0.6  # share of the letters; below it an answer is mixed, and nothing is said
# Written together in one text.
_TOGETHER = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK", "IDEOGRAPHIC": "CJK"}


def dominant_script(text: str) -> str | None:
    """The script of most letters, as Unicode's character names begin: "LATIN", "ARABIC", "CJK" (with kana), "HANGUL".

    None where there are fewer than 20 letters, or none has 60 % of them.
    """
    counts: Counter[str] = Counter()
    for letter in unicodedata.normalize("NFKC", text):  # full-width and mathematical letters are Latin ones
        if letter.isalpha():
            script = unicodedata.name(letter, "UNKNOWN").split()[0]
            counts[_TOGETHER.get(script, script)] += 1
    if (total := counts.total()) < _FEWEST_LETTERS:
        return None
    script, count = counts.most_common(1)[0]
    return script if count >= _DOMINANT * total else None


class Scripts:
    """Which scripts answers are expected in, by the script of the request.

    What held-out rows answer in to requests of a script is expected there: a translator's Arabic to English requests, a coding assistant's
    Latin to Arabic ones. For a script in which no held-out row asks, it is the request's own, or any that held-out rows answer in.

    Args:
        examples: (request, answer) of held-out rows.
    """

    def __init__(self, examples: Iterable[tuple[str, str]]):
        self._answers: dict[str | None, set[str]] = defaultdict(set)
        for request, answer in examples:
            if script := dominant_script(answer):
                self._answers[dominant_script(request)].add(script)

    def switched(self, request: str, answer: str) -> bool:
        """Whether the answer's script is none that is expected. False where request or answer has no dominant script."""
        asked, given = dominant_script(request), dominant_script(answer)
        if asked is None or given is None:
            return False
        expected = self._answers.get(asked) or {asked}.union(*self._answers.values())
        return given not in expected
