"""Our own parsers on made-up input: only `OlpackError` comes out, in seconds and bounded memory. OLPACK_FUZZ=5000: that many inputs of each."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from olpack import recipe
from olpack.data import load_chats, records
from olpack.deploy.modelfile import COMMANDS, parse
from olpack.deploy.parameters import PARAMETERS
from olpack.errors import OlpackError
from olpack.export.pretokenizer import recognize
from olpack.model.checkpoint import read_config, read_safetensors_header, read_tensor_headers
from olpack.model.gguf_header import read_header
from olpack.model.tokenizer_trial import needs_trial
from olpack.recipe import Recipe
from olpack.recipe.tasks import KEYS, load_tasks
from olpack.templating import bounded

SECONDS, MEMORY = 5, 1 << 29
fuzzed = settings(
    max_examples=int(os.environ.get("OLPACK_FUZZ", "50")),
    deadline=None,
    derandomize="OLPACK_FUZZ" not in os.environ,  # the suite tries the same inputs each time
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", " ", "\0", "\ud800", "../x", "/dev/zero", "\x1b[31m", "a" * 5000, "١", "NaN", "true", "1e999", "{{x}}", "*", "&a", "~"]),
)
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**32, 2**63, 2**64, 10**300, -(2**63)]),
    st.floats(),
    st.sampled_from([math.inf, -math.inf, math.nan, 1e308]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def parsed(function: Callable[[], object]) -> None:
    """Call a parser; an input that is refused is refused with a sentence."""
    with bounded(SECONDS, MEMORY):
        try:
            function()
        except OlpackError as error:
            assert error.problem.strip() and "Traceback" not in str(error)


def objects(*keys: str, values: st.SearchStrategy = VALUES) -> st.SearchStrategy[dict]:
    """Objects with some of the keys, and perhaps another."""
    return st.dictionaries(st.sampled_from(keys) | TEXTS, values, max_size=len(keys))


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """A file with some bytes replaced by others, by borders of integers, or cut."""
    numbers = st.sampled_from([0, 1, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
    pieces = st.one_of(st.binary(max_size=9), numbers.map(lambda n: struct.pack("<Q", n)), numbers.map(lambda n: struct.pack("<I", n % 2**32)))
    changes = st.lists(st.tuples(st.integers(0, len(good)), pieces), max_size=4)

    def apply(drawn: tuple[list[tuple[int, bytes]], int]) -> bytes:
        made = bytearray(good)
        for at, piece in drawn[0]:
            made[at : at + len(piece)] = piece
        return bytes(made[: drawn[1]])

    return st.tuples(changes, st.integers(0, 2 * len(good))).map(apply)


# Recipes

SETTINGS = list(Recipe.model_validate({"base": "b", "data": {"train": "t"}}).settings())


@fuzzed
@given(st.dictionaries(st.sampled_from(SETTINGS), VALUES, max_size=3), st.booleans())
def test_settings_of_a_recipe(tmp_path: Path, changes: dict, overridden: bool) -> None:
    document: dict = {"base": "b", "data": {"train": "t"}}
    for key, value in changes.items():
        place = document
        *parents, last = key.split(".")
        for parent in parents:
            place[parent] = place.get(parent) if isinstance(place.get(parent), dict) else {}
            place = place[parent]
        place[last] = value
    path = tmp_path / "recipe.yaml"
    path.write_bytes(yaml.safe_dump(document if not overridden else {"base": "b", "data": {"train": "t"}}).encode("utf-8", "surrogatepass"))
    overrides = [f"{key}={value}" for key, value in changes.items()] if overridden else []
    parsed(lambda: recipe.load(path, overrides))


YAML = st.sampled_from(
    ["base: b", "data: {train: t}", "train:", "  rank: 4", "- ", "*a", "&a ", "? ", ": ", "!!python/object:os.system ", "!!binary x", "!!set {a}",
     "|", ">", "'", '"', "{", "}", "[", "]", ",", "\t", "%YAML 1.2", "---", "...", "<<: *a", "2001-13-01", "0x", "1:60", "#", "null: "]
)  # fmt: skip


@fuzzed
@given(st.lists(st.tuples(YAML | TEXTS, st.sampled_from(["\n", " ", "", "\r", "\u2028"])), max_size=25))
def test_text_of_a_recipe(tmp_path: Path, pieces: list[tuple[str, str]]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes("".join(piece + end for piece, end in pieces).encode("utf-8", "surrogatepass"))
    parsed(lambda: recipe.load(path))


@fuzzed
@given(st.lists(objects(*KEYS), max_size=3))
def test_tasks(tmp_path: Path, items: list[dict]) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in items))
    parsed(lambda: load_tasks(path))


# Data

MESSAGES = objects("role", "content", "from", "value", "tool_calls", "weight", "thinking", "name")
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call"])
TURNS = st.builds(
    lambda role, content, rest: {"role": role, "from": role, "content": content, "value": content, **rest}, ROLE, TEXTS | VALUES, MESSAGES
)
ROWS = st.one_of(
    VALUES,
    objects("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "text", "system", "tools"),
    st.builds(lambda turns, rest: {"messages": turns, **rest}, st.lists(TURNS | MESSAGES, max_size=4), objects("tools", "system")),
    st.builds(lambda turns: {"conversations": turns}, st.lists(TURNS | MESSAGES, max_size=4)),
    st.builds(lambda prompt, completion: {"prompt": prompt, "completion": completion}, TEXTS | st.lists(TURNS), TEXTS | st.lists(TURNS)),
)


@fuzzed
@given(st.lists(ROWS, max_size=4), st.sampled_from([".jsonl", ".json"]), st.integers(0, 400))
def test_rows_of_json(tmp_path: Path, rows: list, suffix: str, cut: int) -> None:
    path = tmp_path / f"rows{suffix}"
    text = json.dumps(rows) if suffix == ".json" else "\n".join(json.dumps(row) for row in rows)
    path.write_text(text[:cut] if cut < 300 else text)
    parsed(lambda: load_chats(path))


@fuzzed
@given(
    st.lists(st.lists(TEXTS | st.sampled_from(["prompt", "completion", "messages", '[{"role": "user"}]', '"']), max_size=4), max_size=5),
    st.booleans(),
)
def test_rows_of_csv(tmp_path: Path, rows: list[list[str]], tabs: bool) -> None:
    written = io.StringIO()
    with suppress(csv.Error):
        csv.writer(written, delimiter="\t" if tabs else ",").writerows([["prompt", "completion"], *rows] if tabs else rows)
    path = tmp_path / ("rows.tsv" if tabs else "rows.csv")
    path.write_bytes(written.getvalue().encode("utf-8", "surrogatepass"))
    parsed(lambda: load_chats(path))


@fuzzed
@given(st.binary(max_size=60), st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]))
def test_files_of_bytes(tmp_path: Path, raw: bytes, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(raw)
    parsed(lambda: load_chats(path))


@pytest.fixture(scope="module")
def parquet() -> bytes:
    import pyarrow
    from pyarrow.parquet import write_table

    written = io.BytesIO()
    write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"]}), written)
    return written.getvalue()


@fuzzed
@given(st.data())
def test_damaged_parquet(tmp_path: Path, parquet: bytes, data: st.DataObject) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(data.draw(damaged(parquet)))
    parsed(lambda: load_chats(path))


def test_parquet_with_a_name_that_is_no_text(tmp_path: Path, parquet: bytes) -> None:
    path = tmp_path / "rows.parquet"
    for count in (1, 2, 3, -1):
        path.write_bytes(parquet.replace(b"prompt", b"\xff\xfeompt", count))
        with pytest.raises(OlpackError):
            load_chats(path)


# Modelfiles

WORDS = st.sampled_from(
    [*COMMANDS, *PARAMETERS, "FROM x\n", "PARAMETER ", "MESSAGE user ", "SYSTEM ", '"""', '"', "\n", " ", "\r", "#", "\ufeff", "1e400"]
)


@fuzzed
@given(st.lists(WORDS | TEXTS, max_size=25))
def test_modelfiles(pieces: list[str]) -> None:
    parsed(lambda: parse("".join(pieces)))


# Headers


def gguf_file() -> bytes:
    """A whole header with each kind of value, by the format's description."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = [
        ("general.architecture", 8, text("llama")), ("split.count", 2, struct.pack("<H", 1)), ("llama.block_count", 4, struct.pack("<I", 2)),
        ("f", 6, struct.pack("<f", 1.0)), ("b", 7, b"\1"), ("t", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b")),
        ("n", 9, struct.pack("<IQ", 4, 2) + bytes(8)), ("l", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 0, 1) + b"\0"),
    ]  # fmt: skip
    infos = [text(name) + struct.pack("<IQQIQ", 2, 32, 4, 0, at) for name, at in (("token_embd.weight", 0), ("output.weight", 512))]
    return (
        b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(keys)) + b"".join(text(k) + struct.pack("<I", t) + v for k, t, v in keys) + b"".join(infos)
    )


@fuzzed
@given(damaged(gguf_file()))
def test_headers_of_ggufs(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    parsed(lambda: read_header(path).parameters)


ENTRIES = objects("dtype", "shape", "data_offsets") | st.builds(
    lambda dtype, shape, offsets: {"dtype": dtype, "shape": shape, "data_offsets": offsets},
    st.sampled_from(["F32", "BF16", "I8", "X", 1]), st.lists(NUMBERS | VALUES, max_size=3), st.lists(NUMBERS | VALUES, max_size=3),
)  # fmt: skip


@fuzzed
@given(st.dictionaries(TEXTS, ENTRIES | VALUES, max_size=3) | VALUES, st.binary(max_size=4), st.sampled_from([0, 0, 0, 1, -1, 2**62]))
def test_headers_of_safetensors(tmp_path: Path, header: object, rest: bytes, lie: int) -> None:
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(raw) + lie)) + raw + rest)
    parsed(lambda: read_safetensors_header(path))
    parsed(lambda: read_tensor_headers(tmp_path))


@fuzzed
@given(objects("weight_map", "metadata", values=VALUES | st.dictionaries(TEXTS, TEXTS, max_size=3)) | VALUES)
@example({"weight_map": {"x": "a" * 5000}})
@example({"weight_map": {"x": "ü" * 200}})
def test_indices_of_safetensors(tmp_path: Path, index: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    parsed(lambda: read_tensor_headers(tmp_path))


@fuzzed
@given(VALUES | st.binary(max_size=20))
def test_configurations(tmp_path: Path, config: object) -> None:
    (tmp_path / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    parsed(lambda: read_config(tmp_path))


KINDS = st.sampled_from(["Sequence", "ByteLevel", "Digits", "Split", "Metaspace", 3, None])
STEPS = st.recursive(
    objects("type", "pattern", "behavior", "invert", "add_prefix_space", "use_regex", "pretokenizers"),
    lambda inner: st.builds(
        lambda kind, parts, rest: {**rest, "type": kind, "pretokenizers": parts, "pattern": parts},
        KINDS, st.lists(inner, max_size=3) | VALUES, objects("behavior", "pattern"),
    ),
    max_leaves=5,
)  # fmt: skip


@fuzzed
@given(objects("pre_tokenizer", "model", values=STEPS | VALUES) | VALUES)
@example(None)
@example({"pre_tokenizer": [], "model": 3})
@example({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": 3}, "behavior": "Isolated"}})
@example({"pre_tokenizer": {"type": "Sequence", "pretokenizers": 3}})
def test_split_patterns(tmp_path: Path, tokenizer: object) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    parsed(lambda: recognize(tmp_path))


DEEP = functools.reduce(lambda text, _: f"[{text}]", range(3000), "")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", read_config), ("tokenizer.json", recognize), ("model.safetensors.index.json", read_tensor_headers),
        ("rows.jsonl", lambda folder: load_chats(folder / "rows.jsonl")), ("rows.json", lambda folder: load_chats(folder / "rows.json")),
        ("tasks.jsonl", lambda folder: load_tasks(folder / "tasks.jsonl")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", [DEEP, "[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\0", "\ufeff{}", ""], ids=range(7))
def test_json_too_deep_or_too_long(tmp_path: Path, name: str, read: Callable[[Path], object], text: str) -> None:
    (tmp_path / name).write_text(text)
    parsed(lambda: read(tmp_path))


@pytest.mark.parametrize("text", [DEEP, "[" * 100_000, "1" * 5000], ids=range(3))
def test_a_safetensors_header_too_deep_or_too_long(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode())
    parsed(lambda: read_safetensors_header(tmp_path / "model.safetensors"))


STEPS = st.recursive(
    st.one_of(
        st.fixed_dictionaries(
            {"type": st.sampled_from(["Split", "Replace", "Strip", "Prepend", "TemplateProcessing", "ByteLevel"]) | VALUES}
        ).flatmap(lambda step: objects("pattern", "content", "single", "pair", "special_tokens").map(lambda more: more | step)),
        st.fixed_dictionaries(
            {
                "type": st.sampled_from(["Split", "Replace"]),
                "pattern": st.fixed_dictionaries({"Regex": st.text(r"ab()[]{}|\\*+?^$.1,", max_size=12)}),
                "content": TEXTS,
            }
        ),
    ),
    lambda inner: st.fixed_dictionaries({"type": st.just("Sequence"), "steps": st.lists(inner, max_size=3)}),
    max_leaves=5,
)


@fuzzed
@given(objects("normalizer", "pre_tokenizer", "post_processor", "decoder", "padding", values=STEPS | VALUES))
def test_steps_of_tokenizers(tokenizer):
    parsed(lambda: needs_trial(tokenizer))


@fuzzed
@given(st.lists(st.sampled_from(["\r", "\n", "\r\n", " ", "{", "}", '"a"', ":", "1", "é", "👩", "\u2028"]), max_size=30), st.integers(4, 9))
def test_lines_are_those_of_the_whole_file(tmp_path_factory, pieces, chunk):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes("".join(pieces).encode())
    whole = path.read_bytes().splitlines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK", chunk)
        assert [line.rstrip(b"\r\n") for line in records._lines(path)] == whole
