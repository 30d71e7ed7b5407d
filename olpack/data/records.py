"""Records from files: JSON lines, JSON, CSV and Parquet, each with the line (or row) that it begins on."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olpack.bounded_json import check_regular
from olpack.errors import OlpackError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TOO_DEEP = "nested too deeply"
TOO_LONG = "longer than 8 million characters"
_MARKS = {";": "semicolons", ",": "commas", "\t": "tabs", "|": "bars"}  # that fields are separated by, of which olpack reads commas and tabs
_WIDE = (  # what files of more than a byte a character begin with: a mark of the byte order, or a character that has one byte in UTF-8
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "utf-32"),
    (rb"\xff\xfe|\xfe\xff", "utf-16"),
    (rb"[^\0]\0\0\0", "utf-32-le"),
    (rb"\0\0\0[^\0]", "utf-32-be"),
    (rb"[^\0]\0", "utf-16-le"),
    (rb"\0[^\0]", "utf-16-be"),
)
MOST_CHARACTERS = 1 << 23  # of one row: some two million tokens
_MOST_COLUMNS = 1000
_MOST_UNPACKED = 1 << 28  # bytes to which a table may unpack, or a hundred times its own size
_MOST_TIMES = 100
_TOGETHER = 64  # rows of a table that are unpacked together
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Record:
    """The value on a line, or the reason why it cannot be read.

    Attributes:
        number: the line that it begins on, or the row of a table, from 1.
        value: what was read.
        problem: why nothing could be read, "" where something was.
    """

    number: int
    value: Any
    problem: str = ""


def counts_rows(path: Path) -> bool:
    """Whether a file has rows but no lines to name."""
    return path.suffix.lower() == ".parquet"


def read_records(path: Path) -> Iterator[Record]:
    """Every record of a file, whose suffix gives its kind.

    Raises:
        OlpackError: the file is missing, of another kind, or cannot be read at all.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise OlpackError(f"{path} is of a kind that olpack does not read.", f"It reads {', '.join(SUFFIXES)}.")
    check_regular(path)
    try:
        if suffix == ".parquet":
            yield from _parquet(path)
            return
        raw = _as_utf8(path.read_bytes(), path)
    except FileNotFoundError:
        raise OlpackError(f"There is no {path}.", "The recipe's `data` names files relative to the recipe.") from None
    except OSError as error:
        raise OlpackError(f"{path} cannot be read: {error.strerror or error}.") from None
    if suffix in (".csv", ".tsv"):
        yield from _text_records(raw, lambda text: _csv(text, "\t" if suffix == ".tsv" else ","))
    elif suffix == ".json" and not _are_lines(raw):
        yield from _text_records(raw, _json)
    else:
        yield from _json_lines(raw)


def _as_utf8(raw: bytes, path: Path) -> bytes:
    """The bytes of a file, in UTF-8 where it begins as UTF-16 or UTF-32 do, as Excel's "Unicode text" and PowerShell's `>` do.

    Raises:
        OlpackError: it begins so, and is no such text.
    """
    encoding = next((name for begin, name in _WIDE if re.match(begin, raw, re.DOTALL)), None)
    if encoding is None:
        return raw
    try:
        return raw.decode(encoding).encode()
    except UnicodeError as error:
        at = f" at byte {error.start + 1}" if isinstance(error, UnicodeDecodeError) else ""
        raise OlpackError(f"{path} begins as {encoding.upper()} and cannot be read as that{at}.", "Save it again as UTF-8.") from None


def _json_lines(raw: bytes) -> Iterator[Record]:
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        if len(line) > 4 * MOST_CHARACTERS:  # as many bytes as so many characters have
            yield Record(number, None, TOO_LONG)
            continue
        try:
            yield Record(number, json.loads(line.decode("utf-8").removeprefix("\ufeff")))
        except UnicodeDecodeError as error:
            yield Record(number, None, _not_utf8(error))
        except json.JSONDecodeError as error:
            yield Record(number, None, f"not JSON: {error.msg.lower()} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            yield Record(number, None, f"not JSON: {_beyond(error)}")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte {error.start + 1} of the line): save the file as UTF-8"


def _beyond(error: ValueError | RecursionError) -> str:
    """The problem of a value that Python's reader does not take."""
    return TOO_DEEP if isinstance(error, RecursionError) else f"a number of more than {sys.get_int_max_str_digits():,} digits"


def _are_lines(raw: bytes) -> bool:
    """Whether a .json file contains JSON lines, as many do: its first line is an object of its own, and not the one with all rows."""
    try:
        first = json.loads(raw.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and not isinstance(first.get("data"), list)


def _text_records(raw: bytes, parse: Callable[[str], Iterator[Record]]) -> Iterator[Record]:
    """Records of a file that is read as a whole. Where it is not UTF-8, each line that is not."""
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        for number, line in enumerate(raw.split(b"\n"), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield Record(number, None, _not_utf8(error))
        return
    yield from parse(text)


def _json(text: str) -> Iterator[Record]:
    """The objects of an array, or of the array that an object has as `data`."""
    line, seen = 1, 0
    try:
        at = _array(text)
        if at is None:
            yield Record(1, None, "neither an array of rows nor an object with an array as `data`")
            return
        for start, value in _elements(text, at):
            line, seen = line + text.count("\n", seen, start), start
            yield Record(line, value)
    except json.JSONDecodeError as error:
        yield Record(error.lineno, None, f"not JSON: {error.msg.lower()} at column {error.colno}")


def _value(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at a character, and where it ends."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise json.JSONDecodeError(_beyond(error), text, at) from None


def _array(text: str) -> int | None:
    """Where the array of rows begins; None where there is none."""
    at = _next(text, 0)
    if text[at : at + 1] != "{":
        return at if text[at : at + 1] == "[" else None
    at = _next(text, at + 1)
    while text[at : at + 1] == '"':
        key, at = _key(text, at)
        if key == "data" and text[at : at + 1] == "[":
            return at
        at = _next(text, _value(text, at)[1])
        if text[at : at + 1] == ",":
            at = _next(text, at + 1)
    return None


def _key(text: str, at: int) -> tuple[Any, int]:
    """A key of an object, and where its value begins."""
    key, at = _value(text, at)
    return key, _next(text, _expect(text, _next(text, at), ":"))


def _elements(text: str, at: int) -> Iterator[tuple[int, Any]]:
    at = _next(text, at + 1)
    while text[at : at + 1] != "]":
        value, end = _value(text, at)
        yield at, value
        at = _next(text, end)
        if text[at : at + 1] != "]":
            at = _next(text, _expect(text, at, ","))
    _expect_end(text, _next(text, at + 1))


def _expect_end(text: str, at: int) -> None:
    """Refuse anything behind the rows but the rest of the object around them: the rows of a second array would be lost."""
    if text[_next(text, 0)] == "{":
        while text[at : at + 1] == ",":
            key, at = _key(text, _next(text, at + 1))
            if key == "data":
                raise json.JSONDecodeError("a second `data`", text, at)
            at = _next(text, _value(text, at)[1])
        at = _next(text, _expect(text, at, "}"))
    if at < len(text):
        raise json.JSONDecodeError("something stands behind the rows", text, at)


def _next(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space  # the pattern matches the empty text, too
    return space.end()


def _expect(text: str, at: int, mark: str) -> int:
    if text[at : at + 1] != mark:
        raise json.JSONDecodeError(f"expecting '{mark}'", text, at)
    return at + 1


def _csv(text: str, delimiter: str) -> Iterator[Record]:
    """Rows below a header. A line break inside quotes belongs to its field, and stays as it is."""
    csv.field_size_limit(MOST_CHARACTERS)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    begins = 1
    try:
        for fields in reader:
            if header is None:
                if any(name := [field.strip() for field in fields]):
                    header = name
                    if problem := _header_problem(header, delimiter):
                        yield Record(begins, None, problem)
                        return
            elif fields and len(fields) != len(header):
                yield Record(begins, None, f"{len(fields)} fields, where the header has {len(header)}")
            elif fields:
                yield Record(begins, dict(zip(header, fields, strict=True)))
            begins = reader.line_num + 1
    except csv.Error as error:
        yield Record(begins, None, f"not CSV: {error}")


def _header_problem(header: list[str], delimiter: str) -> str:
    """Why no row can be read below a header, "" where they can."""
    if len(header) > _MOST_COLUMNS:
        return f"the header has {len(header):,} columns, and at most {_MOST_COLUMNS:,} are read"
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:
        return f"the header has the column {twice[0]} twice"
    if len(header) == 1 and (other := next((mark for mark in _MARKS if mark != delimiter and mark in header[0]), None)):
        return f"the header is one column; is the file separated by {_MARKS[other]}, and not by {_MARKS[delimiter]}?"
    return ""


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            limit = max(_MOST_UNPACKED, _MOST_TIMES * path.stat().st_size)
            groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
            if len(file.schema_arrow) > _MOST_COLUMNS:
                raise OlpackError(f"{path} has {len(file.schema_arrow):,} columns, and at most {_MOST_COLUMNS:,} are read.", "Write it with fewer.")
            if sum(group.total_byte_size for group in groups) > limit or file.metadata.num_rows > limit:
                raise _bomb(path)
            number = unpacked = 0
            for batch in file.iter_batches(_TOGETHER):
                for at in range(batch.num_rows):
                    number += 1
                    try:
                        row = without_nulls(batch.slice(at, 1).to_pylist()[0])
                        if (unpacked := unpacked + _characters(row)) > limit:  # a dictionary is small, and each of its uses is not
                            raise _bomb(path)
                        yield Record(number, row)
                    except UnicodeDecodeError:
                        yield Record(number, None, "not UTF-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError:
        raise OlpackError(f"{path} is no Parquet file that can be read: a name in it is not UTF-8.", "Write it again.") from None
    except (pyarrow.ArrowException, OSError, MemoryError) as error:  # pyarrow raises OSError, too, for what it cannot parse
        why = (str(error).splitlines() or ["it takes too much memory"])[0].rstrip(".")
        raise OlpackError(f"{path} is no Parquet file that can be read: {why}.", "Write it again.") from None


def _characters(value: Any) -> int:
    """Characters of the texts in a value."""
    if isinstance(value, dict | list):
        return sum(map(_characters, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str | bytes) else 8


def _bomb(path: Path) -> OlpackError:
    return OlpackError(f"{path} unpacks to more than {_MOST_TIMES} times its size.", "Write it as JSON lines, or without compression.")


def without_nulls(value: Any) -> Any:
    """A row of an Arrow table without the nulls with which it fills the keys that one object lacks and another has."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value
