"""Does protecting a chat template make the served prompt the trained one? Tried on a folder of published templates.

    python benchmarks/prompt_identity.py FOLDER [--table benchmarks/prompt_identity.md]

FOLDER holds *.jinja, such as models/templates of llama.cpp. Each is rendered as training does (transformers' apply_chat_template, no
variable set) and as the server does (Jinja with enable_thinking, date_string and so on set), first untouched, then as
`olpack.deploy.protect` writes it into a GGUF. Conversations that a template refuses in training are not counted. What the server does
beside rendering (replacing near templates, trimming messages) is not seen here.
"""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

import jinja2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from olpack.deploy.prompt_identity import HARD
from olpack.model.chat_template import pins_for, protect

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def as_trained(template: str, messages: list[dict]) -> str:
    """By transformers, with no template variable set."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)
    tokenizer.chat_template = template
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def as_served(template: str, messages: list[dict]) -> str:
    """By Jinja under the variables that the server sets."""
    now = datetime.now()
    server = {"enable_thinking": True, "thinking": True, "date_string": now.strftime("%d %b %Y"), "datetime": now.strftime("%b %d %Y")}
    [rendered], _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **SPECIAL, **server)
    return rendered


def compare(template: str) -> tuple[int, int, int]:
    """(conversations accepted in training, identical untouched, identical protected)."""
    protected = protect(template, pins_for(template))
    accepted = untouched = pinned = 0
    for messages in HARD.values():
        try:
            expected = as_trained(template, messages)
        except (jinja2.TemplateError, TypeError):
            continue
        accepted += 1
        untouched += _same(template, messages, expected)
        pinned += _same(protected, messages, expected)
    return accepted, untouched, pinned


def _same(template: str, messages: list[dict], expected: str) -> bool:
    try:
        return as_served(template, messages) == expected
    except (jinja2.TemplateError, TypeError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", type=Path, help="write the table here, too")
    arguments = parser.parse_args()
    rows = [(path.stem, *compare(path.read_text(encoding="utf-8"))) for path in sorted(arguments.folder.glob("*.jinja"))]
    counted = [row for row in rows if row[1]]
    whole = [sum(row[column] == row[1] for row in counted) for column in (2, 3)]
    lines = [
        f"{len(rows)} templates, {len(HARD)} conversations each; {len(rows) - len(counted)} accept none of them (without tools).",
        f"Identical on all accepted conversations: **{whole[0]} of {len(counted)}** untouched, **{whole[1]} of {len(counted)}** protected.",
        "",
        "| template | accepted | identical untouched | identical protected |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {name} | {accepted} | {untouched} | {pinned} |" for name, accepted, untouched, pinned in rows),
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if arguments.table:
        command = "python benchmarks/prompt_identity.py FOLDER --table benchmarks/prompt_identity.md"
        arguments.table.write_text(
            f"# The served prompt and the trained prompt\n\nMade by `{command}`, on `models/templates` of llama.cpp.\n\n{text}",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
