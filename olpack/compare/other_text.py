"""Text outside the user's domain, on which the comparison shows what a quant made for that domain loses elsewhere.

The built-in texts are six short ones in English, of things that few packages are about: a ferry, a pie, a town, the heart, the moon, a letter. Of a
package that is about such things, or in another language, they show less than a file of the user's own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from olpack import bounded_json
from olpack.compare.settings import OTHER_LOGITS_BYTES
from olpack.data.render import Renderer
from olpack.data.rows import Chat, TokenRow
from olpack.errors import OlpackError

_MOST_TOKENS = 512  # of one text
_FITTING = 4  # texts whose logits fit on the disk together, however long they are: of a single one there is no standard error
_MOST_CHARACTERS = 32 * _MOST_TOKENS  # more are not tokenized
_MOST_BYTES = 1 << 20  # of a file: its beginning has more tokens than are read

OTHER_TEXTS = (
    "The ferry leaves the harbour at seven in the morning, and those who miss it wait until noon. In winter the crossing takes an hour "
    "longer, because the captain keeps away from the ice along the northern shore. Passengers bring bread, coffee and blankets, and nobody "
    "complains about the cold.",
    "To bake the pie, rub the butter into the flour, add an egg and a little cold water, and let the dough rest for half an hour. Peel six "
    "apples, cut them into thin slices, and mix them with sugar, lemon juice and cinnamon. Bake until the crust is golden and the juice "
    "bubbles at the edges.",
    "After the war the town grew slowly. A mill was built beside the river, then a school, and at last a railway station whose clock was "
    "always four minutes late. The oldest inhabitants still tell how the whole valley came to see the first train, and how the horses ran "
    "away from it.",
    "A healthy heart beats between sixty and a hundred times a minute at rest. During exercise the muscles need more oxygen, so the heart "
    "beats faster and pumps more blood with every stroke. Regular training lowers the resting pulse, because a stronger heart moves more "
    "blood with each beat.",
    "The moon turns once around its axis in the time that it takes to travel around the earth, which is why we always see the same side of "
    "it. The far side was unknown until a probe photographed it. It has more craters and fewer dark plains than the side that faces us.",
    "She opened the letter, read it twice, and put it back into the envelope without a word. Her brother asked whether the news was bad. It "
    "was neither good nor bad, she answered; it only came ten years too late. Outside it had begun to rain, and the lamps along the street "
    "were lit one by one.",
)


def read_texts(path: Path) -> list[str]:
    """The texts of a file, which empty lines separate.

    Raises:
        OlpackError: there is no such file, it is no text in UTF-8, or it has none.
    """
    remedy = "Name a text file in UTF-8, with an empty line between two texts, as `compare.other_text`; or set it to `builtin` or `none`."
    try:
        bounded_json.check_regular(path)
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES)
        whole = path.stat().st_size <= _MOST_BYTES
        found = [part.strip() for part in re.split(r"\n\s*\n", text.decode("utf-8", "strict" if whole else "ignore"))]
    except (OSError, ValueError) as error:
        raise OlpackError(f"{path}, which `compare.other_text` names, cannot be read: {error}.", remedy) from None
    if not (texts := [part for part in found if part]):
        raise OlpackError(f"{path}, which `compare.other_text` names, has no text.", remedy)
    return texts


def other_rows(texts: Sequence[str], source: str, renderer: Renderer, context: int, vocabulary: int) -> list[TokenRow]:
    """Rows of texts, each as the model reads a text that is no conversation. All tokens but those that begin it are target tokens.

    Args:
        source: where the texts are from.
        context: most tokens that the model reads at once; longer texts are cut, at 512 tokens in any case.
        vocabulary: entries of one position's logits. With a large one texts are cut so that the logits of at least four of them fit.
    """
    most = min(_MOST_TOKENS, context, OTHER_LOGITS_BYTES // (4 * vocabulary * min(_FITTING, len(texts))))
    rows = [renderer.rows(Chat([], f"{source}:{number}", text=text[:_MOST_CHARACTERS]))[0] for number, text in enumerate(texts, 1)]
    return [TokenRow(row.ids[:most], row.loss_mask[:most], row.text, row.source) for row in rows]
