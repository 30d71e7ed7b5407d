"""What `builtin/tiny-coder` reads: its tokenizer, the standard library cut into documents, chats and batches, and small generated functions.

`held_out_module` decides which modules are left out, and `held_out` of modelfiles/coding-assistant/make_data.py which of the generated ones.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "modelfiles" / "coding-assistant")]

from exercises import Exercise  # noqa: E402
from make_data import exercises  # noqa: E402

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY, CONTEXT = 8192, 2048
SHORT = 8  # a short row is this part of a window, and there are so many times more in a batch
# Qwen2's split, to the letter: llama.cpp knows it as the pre-tokenizer "qwen2". No NFC in front of it: llama.cpp does none either,
# and without it every text survives encoding and decoding byte for byte.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The comment says what is meant, and keeps the template further than 100 edits from those that Ollama replaces by its own.
CHAT_TEMPLATE = (
    "{#- Every turn is its role, a line break and its text, between the two turn marks. There is no default system prompt: "
    "a chat that has no system turn is trained, and served, without one. -#}\n"
    "{%- for turn in messages -%}\n"
    "{{- '<|im_start|>' ~ turn['role'] ~ '\\n' ~ turn['content'] ~ '<|im_end|>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}"
)

# Tables and generated settings: text that looks like Python and teaches none.
_NOT_CODE = {"site-packages", "__pycache__", "encodings", "pydoc_data"}
_TESTS = {"test", "tests", "idle_test"}


# The standard library


@dataclass(frozen=True)
class Module:
    """One source file of the library. `name` is dotted ("email.utils"); `is_test` says that it tests others."""

    name: str
    text: str
    is_test: bool


def held_out_module(module: str) -> bool:
    """Whether a module (dotted name) is kept for evaluation: about one in ten, whatever the version of Python."""
    return int.from_bytes(hashlib.sha256(f"held out: {module}".encode()).digest()[:8], "big") % 10 == 0


def library_modules(stdlib: Path) -> Iterator[Module]:
    """The library's source files in the order of their paths; tables, and files that are not UTF-8 (tests of decoders), left out."""
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if _NOT_CODE.intersection(parts) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        name = ".".join(parts).removesuffix(".__init__")
        yield Module(name, text.replace("\r\n", "\n"), bool(_TESTS.intersection(parts)))


def documented_functions(module: Module) -> list[str]:
    """Names of a module's own public functions that have a docstring."""
    try:
        tree = ast.parse(module.text)
    except SyntaxError:
        return []  # files that test the parser
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and ast.get_docstring(node)]


def without_docstring(node: ast.FunctionDef, lines: list[str]) -> str | None:
    """The definition's source without its docstring; None where lines cannot simply be taken out."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    docstring = node.body[0]
    after = lines[docstring.end_lineno : node.end_lineno]
    while after and not after[0].strip():
        del after[0]
    code = textwrap.dedent("\n".join(lines[first - 1 : docstring.lineno - 1] + after)).rstrip()
    try:
        (parsed,) = ast.parse(code).body
    except (SyntaxError, ValueError):
        return None
    alike = isinstance(parsed, ast.FunctionDef) and [ast.unparse(line) for line in parsed.body] == [ast.unparse(line) for line in node.body[1:]]
    return code if alike else None


# Tokenizer


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of 8192 tokens, the three special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY, "the corpus is too small for the vocabulary"
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "unk_token": None,
        "additional_special_tokens": [TURN_START],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


# Documents


def in_pieces(text: str, rng: random.Random) -> list[str]:
    """A text cut at random places and after every `def `: tokens of their own on both sides, as where a prompt ends within a token."""
    cuts = {match.end() for match in re.finditer(r"\bdef ", text)}
    cuts.update(rng.randrange(1, len(text)) for _ in range(len(text) // 200))
    places = [0, *sorted(cuts), len(text)]
    return [text[start:end] for start, end in pairwise(places) if start < end]


def as_chat(text: str, rng: random.Random) -> str:
    """Some lines of a text as a chat: the user gives the first part, the assistant goes on and ends the turn."""
    lines = text.splitlines(keepends=True)
    length = rng.randint(6, 25)
    start = rng.randrange(max(1, len(lines) - length))
    part = "".join(lines[start : start + length]).rstrip("\n")
    cut = rng.randint(len(part) // 4, len(part) * 3 // 4)
    cut = part.rfind("\n", 0, cut) + 1 if rng.random() < 0.7 else cut
    return continued(part[:cut], part[cut:], rng)


def as_document(exercise: Exercise, rng: random.Random) -> str:
    """A generated function as a file has it, what it does in the docstring or in a comment; or as a chat that continues it after the docstring."""
    verb, _, rest = exercise.wanted.partition(" ")
    if verb == "whether":
        does = f"Tell {exercise.wanted}."
    elif exercise.verbal:
        does = f"{verb.removesuffix('s').capitalize()} {rest}."
    else:
        does = f"Return {exercise.wanted}."
    head, _, body = exercise.code.partition("\n")
    draw = rng.random()
    if draw < 0.2:
        return f"# {does}\n{exercise.code}\n"
    described = f'{head}\n    """{does}"""\n'
    return f"{described}{body}\n" if draw < 0.5 else continued(described, body, rng)


def continued(given: str, rest: str, rng: random.Random) -> str:
    """A chat: the user gives the beginning of a program, the assistant goes on and ends the turn."""
    system = f"{TURN_START}system\nYou continue Python programs.{TURN_END}\n" if rng.random() < 0.5 else ""
    return f"{system}{TURN_START}user\nContinue this code:\n{given}{TURN_END}\n{TURN_START}assistant\n{rest}{TURN_END}\n"


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return bool(text.strip())


def functions_of(text: str) -> list[str]:
    """Every function and method of a module, moved to the left margin: as written and, where it has a docstring, without it too."""
    try:
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    except SyntaxError:
        return []
    lines, found = text.split("\n"), []
    for node in nodes:
        written = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        bare = without_docstring(node, lines) if ast.get_docstring(node) else None
        found += [form.strip() + "\n" for form in (written, bare) if form and parses(form)]
    return found


def epoch_of(
    modules: list[Module], functions: list[str], generated: int, tokenizer: Tokenizer, window: int, tokens: int, seed: int
) -> list[np.ndarray]:
    """The batches of one pass, in random order: token ids, int32 (rows, length + 1), `tokens` of them learned.

    Two kinds of rows, never mixed in a batch: long ones, of `window`, hold whole files, one after another; short ones begin with a
    document, a function or a chat, as a prompt does. A tenth of the library's documents are chats. Every pass draws other tests, cuts and chats,
    and other `generated` functions, none of a combination that is held out.
    """
    rng = random.Random(seed)
    library = [module.text for module in modules if not module.is_test and len(module.text) > 200]
    tests = [module.text for module in modules if module.is_test and len(module.text) > 200]
    files = library + rng.sample(tests, len(tests) // 3)
    long = [in_pieces(text, rng) if rng.random() < 1 / 6 else [text] for text in rng.sample(files, len(files))]
    short = []
    for text in functions:
        draw = rng.random()
        if draw < 0.4 and text.startswith("def "):
            short.append(["def ", text[4:]])  # how the shortest prompt is cut
        else:
            short.append(in_pieces(text, rng) if draw > 0.85 else [text])
    short += [[as_chat(text, rng)] for text in rng.choices(files, k=(len(long) + len(short)) // 9)]
    short += [[as_document(exercise, rng)] for _, exercise in exercises(False, generated, f"pass {seed}", set())]
    rng.shuffle(short)

    end = tokenizer.token_to_id(END_OF_TEXT)

    def encode(documents: list[list[str]]) -> list[list[int]]:
        encoded = iter(tokenizer.encode_batch([piece for document in documents for piece in document], add_special_tokens=False))
        return [[*chain.from_iterable(next(encoded).ids for _ in document), end] for document in documents]

    row = list(chain.from_iterable(encode(long)))
    starts = range(rng.randrange(window), len(row) - window, window)
    rows = {window: [row[start : start + window + 1] for start in starts]}
    length = window // SHORT
    rows[length], row = [], []
    for ids in encode(short):
        if len(ids) > length:
            continue  # its file shows it
        row += ids
        if len(row) > length:
            rows[length].append(row[: length + 1])
            row = []
    batches = []
    for length, many in rows.items():
        rng.shuffle(many)
        size = tokens // length
        batches += [np.array(many[start : start + size], dtype=np.int32) for start in range(0, len(many) - size + 1, size)]
    rng.shuffle(batches)
    return batches
