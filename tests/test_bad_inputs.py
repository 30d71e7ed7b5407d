"""Inputs that are broken, huge or hostile: each ends in one sentence and exit code 1 or 2, with bounded time and memory.

pytest -rP tests/test_bad_inputs.py    # prints the table: input, exit code, sentence
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from oracle import make_workspace, olpack, write_base
from test_compare_results import quant, results

from olpack import bounded_regex
from olpack.errors import OlpackError
from olpack.model.settings import check_config
from olpack.stages import records
from olpack.workspace import BuildPaths, write_atomically

SECONDS, MEMORY = 90, 3 << 30  # a case that takes longer ends the test run with a traceback; one that takes more memory fails
DEEP = 3000
CHECK = ("data", "check", "oracle")
PLAN = ("plan", "oracle")


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        name: what is wrong with it.
        make: puts it into a working folder with the package `oracle` and its base `base`, and returns the command that reads it.
        says: a part of the sentence.
    """

    name: str
    make: Callable[[Path], tuple[str, ...]]
    says: str


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def bounded() -> Iterator[None]:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def nested(levels: int = DEEP, inner: str = "1") -> str:
    return '{"a":' * levels + inner + "}" * levels


# -- recipes


def recipe(text: str | bytes, *words: str) -> Callable[[Path], tuple[str, ...]]:
    def make(folder: Path) -> tuple[str, ...]:
        path = folder / "modelfiles/oracle/recipe.yaml"
        path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text, encoding="utf-8", errors="surrogatepass")
        return words or PLAN

    return make


def setting(value: str) -> Callable[[Path], tuple[str, ...]]:
    return lambda folder: (*PLAN, "--set", value)


MINIMAL = "base: builtin/tiny-coder\ndata: {train: train.jsonl}\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
RECIPES = [
    Case("10 MB", recipe(MINIMAL + "# " + "x" * 10_000_000), "longer than 1 MB"),
    Case("3,000 levels", recipe(MINIMAL + "train: " + "[" * DEEP + "]" * DEEP), "nested too deep"),
    Case("an alias bomb", recipe(MINIMAL + BOMB), "too large"),
    Case("an alias within its own value", recipe("a: &a [*a]\n"), "contains it"),
    Case("an integer of 5,000 digits", recipe(MINIMAL + f"train: {{rank: {'9' * 5000}}}\n"), "this is no int"),
    Case("no mapping", recipe("- a\n- b\n"), "must contain settings"),
    Case("nothing", recipe(""), "must contain settings"),
    Case("no UTF-8", recipe(b"base: \xff\xfe\n"), "not UTF-8"),
    Case("a character that YAML forbids", recipe(b"base: \x07\n"), "not allowed"),
    Case("a tag of Python", recipe("base: !!python/object/apply:os.system [true]\n"), "could not determine a constructor"),
    Case("half of a character", recipe(MINIMAL.replace("builtin/tiny-coder", '"\\ud800"')), "which no text has"),
    Case("half of a character as a key", recipe(MINIMAL + '"\\ud800": 1\n'), "which no text has"),
    Case("a path with a null", recipe(MINIMAL.replace("train.jsonl", '"a\\0b"')), "which no text has"),
    Case("a path of 100,000 characters", recipe(MINIMAL.replace("train.jsonl", "a" * 100_000 + ".jsonl")), "File name too long"),
    Case("a base of 100,000 characters", recipe(MINIMAL.replace("builtin/tiny-coder", "./" + "a" * 100_000)), "File name too long"),
    Case("1,000 unknown keys", recipe(MINIMAL + "".join(f"key{n}: 1\n" for n in range(1000))), "and 980 more"),
    Case("a list as base", recipe("base: [1]\ndata: {train: a.jsonl}\n"), "valid string"),
    Case("data is a number", recipe("base: builtin/tiny-coder\ndata: 5\n"), "'data'"),
    Case("a name of 5,000 characters", lambda folder: ("plan", "a" * 5000), "too long"),
    Case("a name with a null", lambda folder: ("plan", "a\0b"), "a"),
    Case("a name of half a character", lambda folder: ("plan", "\udcff"), "There is no"),
    Case("target_modules that backtrack", setting("train.target_modules=(.|..|...)+[!?]"), "nested repetitions"),
    Case("--set with 100 levels", setting(".".join("a" * 100) + "=1"), "that many levels"),
    Case("--set of 2 MB", setting("train.rank=" + "[" * 2_000_000), "longer than 1 MB"),
    *(
        Case(f"{key} is {value}", setting(f"{key}={value}"), key.rpartition(".")[2])
        for key, value in (
            ("train.epochs", ".inf"), ("train.epochs", ".nan"), ("train.epochs", "1e12"), ("train.rank", "1000000000000"),
            ("train.alpha", ".inf"), ("train.alpha", "1e300"), ("train.learning_rate", ".nan"), ("train.batch_size", "1000000000000"),
            ("train.weight_decay", ".inf"), ("train.max_grad_norm", ".inf"), ("train.seed", "1000000000000"),
            ("train.eval_every", "1000000000000"), ("train.patience", "1000000000000"), ("train.gpus", "1000000000000"),
            ("data.max_length", "1000000000000"), ("data.eval_share", ".nan"), ("compare.eval_rows", "1000000000000"),
            ("compare.repeats", "1000000000000"), ("compare.generated_tokens", "1000000000000"), ("compare.answer_tokens", "1000000000000"),
            ("compare.max_loss", ".inf"), ("modelfile.parameters.num_ctx", "1000000000000"), ("modelfile.parameters.temperature", ".inf"),
        )
    ),
]  # fmt: skip


# -- data


def data(name: str, content: str | bytes, *words: str) -> Callable[[Path], tuple[str, ...]]:
    """A file of rows, checked with the base."""

    def make(folder: Path) -> tuple[str, ...]:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return words or ("data", "check", name, "--base", "base")

    return make


def linked(target: str) -> Callable[[Path], tuple[str, ...]]:
    """Training rows that are a device."""

    def make(folder: Path) -> tuple[str, ...]:
        (folder / "modelfiles/oracle/train.jsonl").unlink()
        (folder / "modelfiles/oracle/train.jsonl").symlink_to(target)
        return CHECK

    return make


def pipe(place: str, *words: str) -> Callable[[Path], tuple[str, ...]]:
    def make(folder: Path) -> tuple[str, ...]:
        (folder / place).unlink(missing_ok=True)
        os.mkfifo(folder / place)
        return words

    return make


def lying_page(folder: Path) -> tuple[str, ...]:
    """A table whose first page has another size in its own header than in the footer."""
    import pyarrow
    from pyarrow import parquet

    path, value = folder / "a.parquet", "v" * 24
    pieces = [value, *(str(number) * 9 for number in range(100))]
    parquet.write_table(pyarrow.table({"prompt": pieces, "completion": pieces}), path, compression="zstd", use_dictionary=False)
    at = parquet.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    assert content[at : at + 3] == b"\x15\x00\x15"  # a data page, and its size in two bytes: three more come from its greatest value
    greatest = content.index(b"\x18" + value.encode(), at)
    content[greatest : greatest + 25] = b"\x15" + value[3:].encode()
    content[at + 3 : at + 5] = b"\xfc\xff\xff\xff\x0f"
    path.write_bytes(content)
    return "data", "check", "a.parquet", "--base", "base"


def parquet_lists(folder: Path) -> tuple[str, ...]:
    """A table with one text, which its dictionary contains once and each row a thousand times."""
    import pyarrow
    from pyarrow import parquet

    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 3000), ["x" * 1_000_000])
    rows = pyarrow.ListArray.from_arrays([0, 1000, 2000, 3000], texts)
    parquet.write_table(pyarrow.table({"text": rows}), folder / "a.parquet", compression="zstd", store_schema=False)
    return "data", "check", "a.parquet", "--base", "base"


def parquet(rows: int, text: str) -> Callable[[Path], tuple[str, ...]]:
    """A small file that unpacks to a large table."""

    def make(folder: Path) -> tuple[str, ...]:
        import pyarrow
        from pyarrow import parquet

        pieces = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([text]))
        parquet.write_table(pyarrow.table({"prompt": pieces, "completion": pieces}), folder / "bomb.parquet", compression="zstd")
        return "data", "check", "bomb.parquet", "--base", "base"

    return make


def tasks(content: str, name: str = "tasks.jsonl") -> Callable[[Path], tuple[str, ...]]:
    def make(folder: Path) -> tuple[str, ...]:
        (folder / "modelfiles/oracle" / name).write_text(content)
        return (*PLAN, "--set", "compare.tasks=tasks.jsonl")

    return make


def checked_by(name: str, content: bytes) -> Callable[[Path], tuple[str, ...]]:
    def make(folder: Path) -> tuple[str, ...]:
        (folder / "modelfiles/oracle" / name).write_bytes(content)
        return tasks(json.dumps({"prompt": "a", "function": f"{name}:check"}))(folder)

    return make


DATA = [
    Case("rows from /dev/zero", linked("/dev/zero"), "a device and no file"),
    Case("rows from a pipe", pipe("modelfiles/oracle/train.jsonl", *CHECK), "a pipe"),
    Case("a pipe as the data file", pipe("rows.jsonl", "data", "check", "rows.jsonl", "--base", "base"), "a pipe"),
    Case("train: /dev/zero", setting("data.train=/dev/zero"), "a device and no file"),
    Case("a device as base", setting("base=/dev/zero"), "a device and no file"),
    Case("a CSV of a million columns", data("wide.csv", ",".join(f"c{n}" for n in range(1_000_000)) + "\n"), "1,000,000 columns"),
    Case("a CSV with a field of 20 MB", data("long.csv", f'prompt,completion\na,"{"x" * 20_000_000}"\n'), "field larger"),
    Case("a row of 60 MB", data("long.jsonl", '{"text": "' + "x" * 60_000_000 + '"}\n'), "longer than 8 million"),
    Case("a row of 20 MB", data("long.jsonl", '{"text": "' + "x" * 20_000_000 + '"}\n'), "longer than 8 million"),
    Case("an element of 20 MB", data("long.json", '[{"text": "' + "x" * 20_000_000 + '"}]'), "longer than 8 million"),
    Case("a row of 3,000 levels", data("deep.jsonl", '{"text": ' + nested(200_000) + "}\n"), "nested too deeply"),
    Case("an integer of 5,000 digits", data("a.jsonl", '{"text": ' + "9" * 5000 + "}\n"), "digits"),
    Case("a Parquet of 4 GB", parquet(2000, "x" * 2_000_000), "times its size"),
    Case("a Parquet page that names 2 GB as its size", lying_page, "takes more than 1,024 MiB of memory"),
    Case("a Parquet of 600 bytes with lists of 3 GB", parquet_lists, "takes more than 1,024 MiB of memory"),
    Case("a Parquet that is none", data("a.parquet", b"PAR1" + bytes(100) + b"PAR1"), "no Parquet file"),
    Case("a Parquet of nothing", data("a.parquet", b""), "no Parquet file"),
    Case("half of a character in a row", data("a.jsonl", '{"text": "\\ud800"}\n'), ""),
    Case("no rows", data("a.jsonl", ""), "is empty"),
    Case("numbers as rows", data("a.jsonl", "1\n2\n"), "no form that olpack knows"),
    Case("messages is a number", data("a.jsonl", '{"messages": 5}\n'), ""),
    Case("a role is a list", data("a.jsonl", '{"messages": [{"role": [], "content": "a"}]}\n'), ""),
    Case("an unknown suffix", data("a.exe", b"MZ"), "of a kind that olpack does not read"),
    Case("tasks from a pipe", pipe("modelfiles/oracle/tasks.jsonl", *PLAN, "--set", "compare.tasks=tasks.jsonl"), "a pipe"),
    Case("a task of 200,000 levels", tasks(nested(200_000)), "nested too deeply"),
    Case("a task that is a number", tasks("5\n"), "a task is an object"),
    Case("a regex that does not compile", tasks('{"prompt": "a", "regex": "("}\n'), "no regular expression"),
    Case("a check module of zeros", checked_by("check.py", bytes(100)), "no Python file"),
    Case("a check module that does not parse", checked_by("check.py", b"def check(:\n"), "no Python file"),
    Case("a check module that is a program", checked_by("check.so", b"\x7fELF"), "no Python file"),
    Case("a check module of 20 MB", checked_by("check.py", b"#" * 20_000_000), "no Python file"),
]  # fmt: skip


# -- model folders


def changed(file: str, words: tuple[str, ...], **fields: Any) -> Callable[[Path], tuple[str, ...]]:
    """A JSON file of the base with other fields; "a__b" is the field b of a."""

    def make(folder: Path) -> tuple[str, ...]:
        path = folder / "base" / file
        value = json.loads(path.read_text()) if path.is_file() else {}
        for name, field in fields.items():
            *parents, last = name.split("__")
            place = value
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = field
        path.write_text(json.dumps(value))
        return words

    return make


def written(file: str, text: str | bytes, *words: str) -> Callable[[Path], tuple[str, ...]]:
    def make(folder: Path) -> tuple[str, ...]:
        (folder / "base" / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        return words

    return make


ESTIMATE = ("estimate", "base")
ROWS = ("data", "check", "modelfiles/oracle/train.jsonl", "--base", "base")
QUANTIZE = ("quantize", "base", "--quant", "Q8_0")


def config(says: str, **fields: Any) -> Case:
    (name, value), *_ = fields.items()
    return Case(f"config.json: {name} is {value!r:.40}", changed("config.json", ESTIMATE, **fields), says)


def header(entries: Any, *, length: int | None = None, body: int = 0) -> Callable[[Path], tuple[str, ...]]:
    """Weights with a made-up header."""

    def make(folder: Path) -> tuple[str, ...]:
        text = entries.encode() if isinstance(entries, str) else json.dumps(entries).encode()
        raw = struct.pack("<Q", len(text) if length is None else length) + text + bytes(body)
        (folder / "base/model.safetensors").write_bytes(raw)
        return QUANTIZE

    return make


def tensor(**fields: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}}


MODELS = [
    config("num_hidden_layers", num_hidden_layers=100_000),
    config("num_hidden_layers", num_hidden_layers=-1),
    config("num_hidden_layers", num_hidden_layers=0),
    config("num_hidden_layers", num_hidden_layers="two"),
    config("num_hidden_layers", num_hidden_layers=2.5),
    config("num_hidden_layers", num_hidden_layers=True),
    config("hidden_size", hidden_size=2**40),
    config("hidden_size", hidden_size=-256),
    config("hidden_size", hidden_size={"a": 1}),
    config("intermediate_size", intermediate_size=2**33),
    config("intermediate_size", intermediate_size=[512] * 10_000),
    config("vocab_size", vocab_size=2**31),
    config("vocab_size", vocab_size=0),
    config("max_position_embeddings", max_position_embeddings=2**40),
    config("max_position_embeddings", max_position_embeddings=-5),
    config("max_position_embeddings", max_position_embeddings="long"),
    config("num_attention_heads", num_attention_heads=0),
    config("num_attention_heads", num_attention_heads=2**20),
    config("head_dim", head_dim=-64),
    config("model_type", model_type=7),
    config("makes no model", model_type="no-such-model"),
    config("architectures", architectures=[{"a": 1}]),
    config("architectures", architectures="Qwen3ForCausalLM"),
    config("layer_types", layer_types=["full_attention"] * 10_000),
    config("layer_types", layer_types=5),
    config("text_config", text_config="a text"),
    config("quantization_config", quantization_config=[1]),
    config("rope_parameters", rope_parameters=[1]),
    config("factor", rope_parameters__factor=-4.0, rope_parameters__rope_type="linear"),
    config("factor", rope_parameters__factor=float("inf")),
    config("factor", rope_parameters__factor="four"),
    config("rope_theta", rope_parameters__rope_theta=0),
    config("rope_theta", rope_parameters__rope_theta=1e300),
    config("rope_type", rope_parameters__rope_type=5),
    config("high_freq_factor", rope_parameters__high_freq_factor=1.0, rope_parameters__low_freq_factor=1.0),
    config("num_experts", num_experts=2**14, num_hidden_layers=1000),
    Case("config.json of 200,000 levels", written("config.json", nested(200_000), *ESTIMATE), "nested too deep"),
    Case("config.json of 100 levels", written("config.json", nested(100), *ESTIMATE), "nested too deep"),
    Case("config.json with an integer of 5,000 digits", written("config.json", '{"a": ' + "9" * 5000 + "}", *ESTIMATE), "digits"),
    Case("config.json is a list", written("config.json", "[]", *ESTIMATE), "no JSON object"),
    Case("config.json is no UTF-8", written("config.json", b"\xff\xfe", *ESTIMATE), "not UTF-8"),
    Case("config.json is a pipe", pipe("base/config.json", *ESTIMATE), "config.json"),
    Case("config.json as the base", lambda folder: ("estimate", "base/tokenizer.json"), "model_type"),
    Case("plan of 10^5 layers", changed("config.json", PLAN, num_hidden_layers=100_000), "num_hidden_layers"),
    Case("quantize of 10^5 layers", changed("config.json", QUANTIZE, num_hidden_layers=100_000), "num_hidden_layers"),
    Case("tokenizer.json of 200,000 levels", written("tokenizer.json", nested(200_000), *ROWS), "nested too deep"),
    Case("tokenizer.json is a list", written("tokenizer.json", "[]", *ROWS), "no JSON object"),
    Case("tokenizer.json: model is a text", changed("tokenizer.json", ROWS, model="a"), "model must be an object"),
    Case("tokenizer.json: a negative id", changed("tokenizer.json", ROWS, model__vocab={"a": -1}), "model.vocab"),
    Case("tokenizer.json: an id of 2^60", changed("tokenizer.json", ROWS, model__vocab={"a": 2**60}), "model.vocab"),
    Case("tokenizer.json: ids are texts", changed("tokenizer.json", ROWS, model__vocab={"a": "b"}), "model.vocab"),
    Case("tokenizer.json: merges is a number", changed("tokenizer.json", ROWS, model__merges=5), "model.merges"),
    Case("tokenizer.json: added_tokens are texts", changed("tokenizer.json", ROWS, added_tokens=["a"]), "added_tokens"),
    Case("tokenizer.json: an unknown model", changed("tokenizer.json", ROWS, model__type="Nothing"), "does not load"),
    Case("tokenizer.json: an expression that does not compile",
         changed("tokenizer.json", ROWS, pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
         "does not load"),
    Case("tokenizer_config.json is a list", written("tokenizer_config.json", "[1]", *ROWS), "no JSON object"),
    Case("tokenizer_config.json is a pipe", pipe("base/tokenizer_config.json", *ROWS), "a pipe"),
    Case("tokenizer_config.json: a token is a number", changed("tokenizer_config.json", ROWS, eos_token=5), "eos_token"),
    Case("tokenizer_config.json: the template is a number", changed("tokenizer_config.json", ROWS, chat_template=5), "chat_template"),
    Case("tokenizer_config.json: the class is a list", changed("tokenizer_config.json", ROWS, tokenizer_class=["a"]), "tokenizer_class"),
    Case("tokenizer_config.json: added tokens are a list", changed("tokenizer_config.json", ROWS, added_tokens_decoder=[1]), "added_tokens_decoder"),
    Case("generation_config.json of 200,000 levels", written("generation_config.json", nested(200_000), *ROWS), "nested too deep"),
    Case("generation_config.json: an end is a text", changed("generation_config.json", ROWS, eos_token_id="end"), "eos_token_id"),
    Case("generation_config.json: an end of 2^60", changed("generation_config.json", ROWS, eos_token_id=[2**60]), "eos_token_id"),
    *(
        Case(f"a chat template that {what}", changed("tokenizer_config.json", ROWS, chat_template=text), says)
        for what, text, says in (
            ("loops", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "chat template fails"),
            ("allocates", "{{ 'a' * 10**10 }}", "chat template"),
            ("writes 20 MB", "{{ 'a' * 20000000 }}", "characters"),
            ("does not parse", "{% for %}", "chat template"),
            ("recurses", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "chat template"),
            ("divides by zero", "{{ 1 // 0 }}", "chat template"),
            ("reads Python's internals", "{{ cycler.__init__.__globals__ }}", "chat template"),
        )
    ),
    Case("weights: a negative shape", header(tensor(shape=[-1]), body=4), "impossible shape"),
    Case("weights: a negative place", header(tensor(data_offsets=[-4, 0]), body=4), "impossible shape"),
    Case("weights: a shape of 2^70", header(tensor(shape=[2**70]), body=4), "impossible shape"),
    Case("weights: a shape of texts", header(tensor(shape=["a"]), body=4), "impossible shape"),
    Case("weights: a shape that is a number", header(tensor(shape=5), body=4), "no safetensors file"),
    Case("weights: a type that is a list", header(tensor(dtype=[]), body=4), "no safetensors file"),
    Case("weights: the size does not fit", header(tensor(shape=[2]), body=4), "does not fit its shape"),
    Case("weights: a tensor is a number", header({"w": 5}), "no safetensors file"),
    Case("weights: the header is a list", header([1, 2]), "no safetensors file"),
    Case("weights: a header of 200,000 levels", header(nested(200_000)), "no safetensors file"),
    Case("weights: a header of 2^60 bytes", header({}, length=2**60), "truncated"),
    Case("weights: nothing", written("model.safetensors", b"", *QUANTIZE), "truncated"),
    Case("the index is a list", written("model.safetensors.index.json", "[]", *QUANTIZE), "no JSON object"),
    Case("the index of 200,000 levels", written("model.safetensors.index.json", nested(200_000), *QUANTIZE), "nested too deep"),
    Case("the index names another folder", written("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}', *QUANTIZE), "weight_map"),
]  # fmt: skip


# -- adapters


def adapter(says: str, what: str, *, raw: str | None = None, weights: bytes | None = None, **fields: Any) -> Case:
    def make(folder: Path) -> tuple[str, ...]:
        import torch
        from safetensors.torch import save_file

        home = folder / "adapter"
        home.mkdir()
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **fields}
        settings = {name: value for name, value in settings.items() if value != "absent"}
        (home / "adapter_config.json").write_text(json.dumps(settings) if raw is None else raw)
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        save_file({f"{name}.lora_A.weight": torch.zeros(4, 256), f"{name}.lora_B.weight": torch.zeros(256, 4)}, home / "adapter_model.safetensors")
        if weights is not None:
            (home / "adapter_model.safetensors").write_bytes(weights)
        return (*QUANTIZE, "--adapter", "adapter")

    return Case(f"an adapter: {what}", make, says)


def safetensors(entries: Any, body: int = 0) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


ADAPTERS = [
    adapter("no lora_alpha", "lora_alpha is missing", lora_alpha="absent"),
    adapter("lora_alpha", "lora_alpha is a text", lora_alpha="sixteen"),
    adapter("lora_alpha", "lora_alpha is infinite", lora_alpha=float("inf")),
    adapter("400 digits", "lora_alpha of 400 digits", raw='{"peft_type": "LORA", "r": 4, "lora_alpha": ' + "9" * 400 + "}"),
    adapter("rank r", "a negative rank", r=-4),
    adapter("rank r", "a rank that is a text", r="four"),
    adapter("rank_pattern", "a list as rank_pattern", rank_pattern=[1]),
    adapter("rank_pattern", "a text as a rank", rank_pattern={"q_proj": "a"}),
    adapter("no regular expression", "a pattern that does not compile", rank_pattern={"(": 4}),
    adapter("takes more than", "a pattern that backtracks", rank_pattern={"(.|..|...)+[!?]": 4}),
    adapter("nested too deep", "200,000 levels", raw=nested(200_000)),
    adapter("", "a list", raw="[]"),
    adapter("of the kind", "peft_type is a list", peft_type=["LORA"]),
    adapter("", "a list as the start", init_lora_weights=["a"]),
    adapter("", "tokens are a text", trainable_token_indices="abc"),
    adapter("", "an alpha of 10^39 and a rank of another number", lora_alpha=10**39, r=5),
    adapter("impossible shape", "a negative place", weights=safetensors(tensor(data_offsets=[-4, 0]), 4)),
    adapter("truncated", "no weights", weights=b""),
]


# -- GGUF files


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name.encode()) + struct.pack("<I", kind) + value


ARCHITECTURE = key("general.architecture", 8, text(b"llama"))


def described(shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, name: bytes = b"w", axes: int | None = None) -> bytes:
    lengths = b"".join(struct.pack("<Q", length) for length in shape)
    return text(name) + struct.pack("<I", len(shape) if axes is None else axes) + lengths + struct.pack("<IQ", kind, offset)


def gguf(keys: list[bytes], tensors: list[bytes], *, version: int = 3, counts: tuple[int, int] | None = None, body: int = 4096) -> bytes:
    count = counts or (len(tensors), len(keys))
    return b"GGUF" + struct.pack("<IQQ", version, *count) + b"".join(keys) + b"".join(tensors) + bytes(body)


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


HEADERS = {
    "a type of 2^31": gguf([ARCHITECTURE], [described(kind=2**31)]),
    "a type of 2^32 - 1": gguf([ARCHITECTURE], [described(kind=2**32 - 1)]),
    "a type of 63": gguf([ARCHITECTURE], [described(kind=63)]),
    "a dimension of zero": gguf([ARCHITECTURE], [described((0, 32))]),
    "no dimensions": gguf([ARCHITECTURE], [described(())]),
    "2^31 dimensions": gguf([ARCHITECTURE], [described(axes=2**31)]),
    "a dimension of 2^63": gguf([ARCHITECTURE], [described((2**63, 2))]),
    "two tensors of one name": gguf([ARCHITECTURE], [described(), described()]),
    "an offset of 2^63": gguf([ARCHITECTURE], [described(offset=2**63)]),
    "a text of 2^40 bytes": gguf([key("general.name", 8, text(b"a", 2**40))], [described()]),
    "a text of 2^63 bytes": gguf([key("general.name", 8, text(b"a", 2**63))], [described()]),
    "a key of 2^50 bytes": gguf([text(b"a", 2**50)], [described()]),
    "a list in a list": gguf([ARCHITECTURE, key("a", 9, array(9, 1, array(4, 1, bytes(4))))], [described()]),
    "2^40 empty lists": gguf([ARCHITECTURE, key("a", 9, array(9, 2**40))], [described()]),
    "2^40 empty texts": gguf([ARCHITECTURE, key("a", 9, array(8, 2**40))], [described()]),
    "2^61 numbers": gguf([ARCHITECTURE, key("a", 9, array(10, 2**61))], [described()]),
    "a list of an unknown type": gguf([ARCHITECTURE, key("a", 9, array(99, 1))], [described()]),
    "a value of an unknown type": gguf([ARCHITECTURE, key("a", 99, b"")], [described()]),
    "2^60 keys": gguf([ARCHITECTURE], [described()], counts=(1, 2**60)),
    "2^60 tensors": gguf([ARCHITECTURE], [described()], counts=(2**60, 1)),
    "a text as split count": gguf([ARCHITECTURE, key("split.count", 8, text(b"two"))], [described()]),
    "a number as architecture": gguf([key("general.architecture", 4, bytes(4))], [described()]),
    "a list as architecture": gguf([key("general.architecture", 9, array(8, 1, text(b"llama")))], [described()]),
    "an alignment of zero": gguf([ARCHITECTURE, key("general.alignment", 4, bytes(4))], [described()]),
    "an alignment of 24": gguf([ARCHITECTURE, key("general.alignment", 4, struct.pack("<I", 24))], [described()]),
    "a key that is no UTF-8": gguf([text(b"\xff\xfe") + struct.pack("<I", 4) + bytes(4)], [described()]),
    "one key twice": gguf([ARCHITECTURE, ARCHITECTURE], [described()]),
    "version 1": gguf([ARCHITECTURE], [described()], version=1),
    "version 2^31": gguf([ARCHITECTURE], [described()], version=2**31),
    "an end in its header": gguf([ARCHITECTURE], [described()])[:40],
    "nothing": b"",
    "no architecture": gguf([], [described()]),
    "a block of 2^40": gguf([ARCHITECTURE], [described(name=b"blk.1099511627776.w")]),
}  # fmt: skip
GGUFS = [
    Case(f"a GGUF with {name}: {words[0]}", data("a.gguf", content, *words), "" if "2^40" in name and "block" in name else "a.gguf")
    for name, content in HEADERS.items()
    for words in (("recommend", "a.gguf"), ("quantize", "a.gguf", "--quant", "Q8_0", "--out", "made"))
]
GGUFS.append(
    Case("an importance matrix with a type of 2^31", data("a.gguf", HEADERS["a type of 2^31"], *QUANTIZE, "--importance", "a.gguf"), "a.gguf")
)


# -- results and records


def earlier(what: str, says: str, change: Callable[[dict[str, Any]], object] | None, raw: str | None = None) -> Case:
    def make(folder: Path) -> tuple[str, ...]:
        value = json.loads(results(quant("Q4_K_M", 1, [1.0, 2.0, 3.0])).model_dump_json())
        if change:
            change(value)
        (folder / "earlier.json").write_text(json.dumps(value) if raw is None else raw)
        return "compare", "oracle", "--against", "earlier.json"

    return Case(f"--against: {what}", make, says)


RESULTS = [
    earlier("a number beyond float", "not a results file", lambda value: value["quants"][0].update(size_bytes=10**400)),
    earlier("an infinite number", "is inf", lambda value: value["quants"][0]["perplexity"].update(value=float("inf"))),
    earlier("a number of 5,000 digits", "digits", None, raw='{"a": ' + "9" * 5000 + "}"),
    earlier("no rows", "perplexity of", lambda value: value.update(rows=None)),
    earlier("a short list of rows", "has 2 rows", lambda value: value["quants"][0]["perplexity"].update(row_nll=[1.0, 2.0])),
    earlier("an empty list of rows", "has 0 rows", lambda value: value["quants"][0]["perplexity"].update(row_nll=[])),
    earlier("a row of 10^200 nats", "nats", lambda value: value["quants"][0]["perplexity"].update(row_nll=[1e200, 1.0, 1.0])),
    earlier("no tokens", "learned_tokens", lambda value: value["rows"].update(learned_tokens=[0, 0, 0])),
    earlier("a short list of answers", "answers", lambda value: value["quants"][0].update(answers=[])),
    earlier("quants is a number", "quants", lambda value: value.update(quants=5)),
    earlier("a list", "not a results file", None, raw="[]"),
    earlier("200,000 levels", "nested too deep", None, raw=nested(200_000)),
    earlier("no UTF-8", "not a results file", None, raw="\udcff".encode("utf-8", "surrogateescape").decode("latin-1")),
]

RECORDS = {
    "a list": [],
    "a text": "a",
    "inputs are a list": {"inputs": [], "outputs": {}, "result": {}},
    "no result": {"inputs": {}, "outputs": {}},
    "outputs are texts": {"inputs": {"a": 1}, "outputs": {"a": "b"}, "result": {}},
    "outputs are short": {"inputs": {"a": 1}, "outputs": {"a": [1, 2]}, "result": {}},
    "outputs of 10^30 bytes": {"inputs": {"a": 1}, "outputs": {"a": [10**30, "b", 5]}, "result": {}},
    "a finished training without its adapter": {"inputs": {"a": 1}, "outputs": {}, "result": {}},
    "a digest that is a number": {"inputs": {}, "outputs": {}, "result": {"adapter_digest": 5}},
    "a time that is none": {"inputs": {}, "outputs": {}, "result": {"rendered_at": "noon"}},
    "a recommended list": {"inputs": {}, "outputs": {}, "result": {"recommended": ["a"]}},
    "registered texts": {"inputs": {}, "outputs": {}, "result": {"registered": ["a"]}},
    "registered without a digest": {"inputs": {}, "outputs": {}, "result": {"registered": [{"model": "a"}]}},
    "proved is a list": {"inputs": {}, "outputs": {}, "result": {"proved": []}},
}


def test_an_expression_that_backtracks_is_given_up() -> None:
    with pytest.raises(OlpackError, match=r"of `export\.tensor_types` takes more than 2 s"):
        bounded_regex.search("(.|..|...)+[!?]", "blk.0.attn_k.weight" * 4, "`export.tensor_types`")


def test_the_name_of_a_broken_file_is_printed(tmp_path: Path) -> None:
    folder = tmp_path / "modelfiles" / os.fsdecode(b"\xff")
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(MINIMAL)
    command = [sys.executable, "-m", "olpack", "list"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8", "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert "modelfiles/\ufffd/recipe.yaml" in done.stdout.decode()


@pytest.mark.parametrize("value", RECORDS.values(), ids=RECORDS)
def test_a_stage_record_of_the_wrong_shape_is_none(tmp_path: Path, value: Any) -> None:
    paths = BuildPaths("oracle", tmp_path / "build/oracle")
    for unit in ("train", "deploy", "compare"):
        write_atomically(paths.stage(unit), json.dumps(value))
    assert records.read(paths, "train") is None and records.result(paths, "deploy") == {}
    (tmp_path / "modelfiles/oracle").mkdir(parents=True)
    (tmp_path / "modelfiles/oracle/recipe.yaml").write_text(MINIMAL)
    code, printed, errors = olpack(tmp_path, "list", "--json")
    assert code == 0, errors
    assert next(row for row in json.loads(printed) if row["name"] == "oracle")["recommended"] is None


def test_every_language_model_of_transformers_has_settings_that_pass() -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    passed = 0
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[name]().to_json_string(use_diff=False)
        except Exception:  # a kind that has no defaults, or needs another package
            continue
        check_config(json.loads(config), name)
        passed += 1
    assert passed > 100


CASES = [("recipe", case) for case in RECIPES]
CASES += [("data", case) for case in DATA]
CASES += [("model", case) for case in MODELS]
CASES += [("adapter", case) for case in ADAPTERS]
CASES += [("gguf", case) for case in GGUFS]
CASES += [("results", case) for case in RESULTS]


def test_the_table_is_long_enough() -> None:
    names = [(kind, case.name) for kind, case in CASES]
    assert len(set(names)) >= 120


@pytest.mark.parametrize(("kind", "case"), CASES, ids=[f"{kind}: {case.name}" for kind, case in CASES])
def test_a_bad_input_is_named_in_a_sentence(tmp_path: Path, base: Path, bounded: None, kind: str, case: Case) -> None:
    shutil.copytree(base, tmp_path / "base")
    make_workspace(tmp_path, tmp_path / "base")
    code, printed, errors = olpack(tmp_path, *case.make(tmp_path))
    print(f"{kind} | {case.name} | {code} | {' '.join((errors or printed).split())[-300:]}")
    assert code in (1, 2), printed + errors
    assert "Unexpected error" not in errors and "Traceback" not in printed + errors
    assert case.says.lower() in (printed + errors).lower()
    if not printed:
        assert "olpack: " in errors or "Error" in errors
