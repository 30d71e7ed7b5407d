"""Bases for the examples that tiny-coder alone does not fit: with a chat template that writes tools, and with tokens for Arabic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

TEMPLATE = """\
{%- if tools %}<|im_start|>system
Call a function as <tool_call>{"name": …, "arguments": …}</tool_call>. The functions:
{%- for tool in tools %}
{{ tool.function | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def with_tools(base: Path, folder: Path) -> Path:
    """A copy of a model's folder, made once, with `TEMPLATE` as its chat template."""
    if not folder.is_dir():
        shutil.copytree(base, folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def write_arabic(folder: Path, texts: list[str]) -> Path:
    """A model of two layers with random weights and a byte-level tokenizer that was trained on some texts.

    Args:
        folder: made here.
        texts: decide the merges of the tokenizer; bytes that they lack are tokens, too.
    """
    import tiny_models
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tiny_models.write_model(folder, vocab_size=1024)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=tiny_models.SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}), encoding="utf-8")
    return folder
