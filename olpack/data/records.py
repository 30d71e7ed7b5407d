"""Records from files: JSON lines, JSON, CSV and Parquet, each with the line (or row) that it begins on."""

from __future__ import annotations

import codecs
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from olpack.bounded_json import check_regular
from olpack.errors import OlpackError
from olpack.installed import optional
from olpack.trials import Trial
from olpack.workspace import CHUNK

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
_ROW = 100  # bytes, whatever is in it
_TRIAL_S, _TRIAL_MEMORY = 60, 1 << 30  # seconds and bytes that a table may take to unpack, and more if it is large
_UNPACKED = "Write it as JSON lines, or without compression."
_LONGEST_LINE = 4 * MOST_CHARACTERS  # bytes: as many as so many characters have
_MOST_WHOLE = 1 << 30  # bytes of an array in JSON
_TOGETHER = 64  # rows of a table that are unpacked together
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_parquet_trial = Trial("olpack.data.parquet_worker")


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
        elif suffix in (".csv", ".tsv"):
            yield from _csv(path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".json" and not _are_lines(path):
            yield from _json(path)
        else:
            yield from _json_lines(path)
    except FileNotFoundError:
        raise OlpackError(f"There is no {path}.", "The recipe's `data` names files relative to the recipe.") from None
    except OSError as error:
        raise OlpackError(f"{path} cannot be read: {error.strerror or error}.") from None


def _chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a part at a time; in UTF-8 where it begins as UTF-16 or UTF-32 do, as Excel's "Unicode text" and PowerShell's `>` do.

    Raises:
        OlpackError: it begins so, and is no such text.
    """
    with path.open("rb") as file:
        chunk = file.read(CHUNK)
        encoding = next((name for begin, name in _WIDE if re.match(begin, chunk, re.DOTALL)), None)
        decoder = codecs.getincrementaldecoder(encoding)() if encoding else None
        read = 0
        while chunk or (decoder and read):
            undecoded = len(decoder.getstate()[0]) if decoder else 0
            try:
                yield decoder.decode(chunk, final=not chunk).encode() if decoder else chunk
            except UnicodeError as error:
                at = f" at byte {read - undecoded + error.start + 1}" if isinstance(error, UnicodeDecodeError) else ""
                problem = f"{path} begins as {str(encoding).upper()} and cannot be read as that{at}."
                raise OlpackError(problem, "Save it again as UTF-8.") from None
            if not chunk:
                return
            read += len(chunk)
            chunk = file.read(CHUNK)


def _lines(path: Path) -> Iterator[bytes | None]:
    """The lines of a file in UTF-8, with their ends; None for one that is too long for a row. No more than one line is in memory."""
    rest, cut = b"", False
    for chunk in _chunks(path):
        lines = (rest + chunk).splitlines(keepends=True)
        rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""  # \r may be the first half of a line's end
        for line in lines:
            yield None if cut or len(line) > _LONGEST_LINE else line
            cut = False
        if len(rest) > _LONGEST_LINE:
            rest, cut = rest[-1:], True
    if rest:
        yield None if cut else rest


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), 1):
        if line is None:
            yield Record(number, None, TOO_LONG)
            continue
        if not (line := line.rstrip(b"\r\n")).strip():
            continue
        try:
            yield Record(number, json.loads(line.decode("utf-8").removeprefix("\ufeff")))
        except UnicodeDecodeError as error:
            yield Record(number, None, _undecoded(error))
        except json.JSONDecodeError as error:
            yield Record(number, None, f"not JSON: {error.msg.lower()} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            yield Record(number, None, f"not JSON: {_beyond(error)}")


def _undecoded(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte {error.start + 1} of the line): save the file as UTF-8"


def _beyond(error: ValueError | RecursionError) -> str:
    """The problem of a value that Python's reader does not take."""
    return TOO_DEEP if isinstance(error, RecursionError) else f"a number of more than {sys.get_int_max_str_digits():,} digits"


def _are_lines(path: Path) -> bool:
    """Whether a .json file contains JSON lines, as many do: its first line is an object of its own, and not the one with all rows."""
    begin = next((line for line in _lines(path) if line is None or line.removeprefix(b"\xef\xbb\xbf").strip()), None)
    try:
        first = json.loads((begin or b"").removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and not isinstance(first.get("data"), list)


def _not_utf8(path: Path) -> list[Record]:
    """Each line of a file that is not UTF-8."""
    found = []
    for number, line in enumerate(_lines(path), 1):
        try:
            (line or b"").decode("utf-8")
        except UnicodeDecodeError as error:
            found.append(Record(number, None, _undecoded(error)))
    return found


def _json(path: Path) -> Iterator[Record]:
    """The objects of an array, or of the array that an object has as `data`.

    Raises:
        OlpackError: the file is too large to be read as a whole.
    """
    if (size := path.stat().st_size) > _MOST_WHOLE:
        raise OlpackError(
            f"{path} has {size:,} bytes, and an array of at most {_MOST_WHOLE:,} bytes is read.", "Write JSON lines, which are read row by row."
        )
    line, seen = 1, 0
    try:
        text = b"".join(_chunks(path)).decode("utf-8").removeprefix("\ufeff")
        at = _array(text)
        if at is None:
            yield Record(1, None, "neither an array of rows nor an object with an array as `data`")
            return
        for start, value in _elements(text, at):
            line, seen = line + text.count("\n", seen, start), start
            yield Record(line, value)
    except UnicodeDecodeError:
        yield from _not_utf8(path)
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


def _csv(path: Path, delimiter: str) -> Iterator[Record]:
    """Rows below a header. A line break inside quotes belongs to its field, and stays as it is."""
    if wrong := _not_utf8(path):
        yield from wrong
        return
    csv.field_size_limit(MOST_CHARACTERS)
    reader = csv.reader(_csv_lines(path), delimiter=delimiter, strict=True)
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


def _csv_lines(path: Path) -> Iterator[str]:
    """The lines of a file, up to the end of the longest row that is read.

    Raises:
        csv.Error: one is too long.
    """
    for number, line in enumerate(_lines(path)):
        if line is None:
            raise csv.Error(f"line {number + 1} is {TOO_LONG}")
        yield line.decode("utf-8").removeprefix("" if number else "\ufeff")


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
    pyarrow = optional("pyarrow", "Parquet files")

    status = path.stat()
    _try_parquet(path, status.st_size, status.st_mtime_ns)
    try:
        yield from parquet_records(path)
    except FileNotFoundError:
        raise
    except UnicodeDecodeError:
        raise OlpackError(f"{path} is no Parquet file that can be read: a name in it is not UTF-8.", "Write it again.") from None
    except (pyarrow.ArrowException, OSError, MemoryError) as error:  # pyarrow raises OSError, too, for what it cannot parse
        why = (str(error).splitlines() or ["it takes too much memory"])[0].rstrip(".")
        raise OlpackError(f"{path} is no Parquet file that can be read: {why}.", "Write it again.") from None


@cache
def _try_parquet(path: Path, size: int, modified: int) -> None:
    """Have a worker read a file first: its pages, dictionaries and lists unpack to what they say, whatever its footer says.

    Args:
        size, modified: the file's size in bytes and its modification time in ns. One that is not changed is tried once.
    """
    _parquet_trial.attempt(str(path.absolute()), str(path), _UNPACKED, _TRIAL_S + (size >> 20), _TRIAL_MEMORY + 2 * size)


def parquet_records(path: Path) -> Iterator[Record]:
    """The rows of a Parquet file.

    Raises:
        OlpackError: it has too many columns, or unpacks to too much.
        pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError: it cannot be read.
    """
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        limit = max(_MOST_UNPACKED, _MOST_TIMES * path.stat().st_size)
        groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        if len(file.schema_arrow) > _MOST_COLUMNS:
            raise OlpackError(f"{path} has {len(file.schema_arrow):,} columns, and at most {_MOST_COLUMNS:,} are read.", "Write it with fewer.")
        if sum(group.total_byte_size for group in groups) > limit or file.metadata.num_rows * _ROW > limit:
            raise _bomb(path)
        number = unpacked = 0
        for batch in file.iter_batches(_TOGETHER):
            for at in range(batch.num_rows):
                number += 1
                try:
                    row = without_nulls(batch.slice(at, 1).to_pylist()[0])
                    if (unpacked := unpacked + _ROW + _characters(row)) > limit:  # a dictionary is small, and each of its uses is not
                        raise _bomb(path)
                    yield Record(number, row)
                except UnicodeDecodeError:
                    yield Record(number, None, "not UTF-8")


def _characters(value: Any) -> int:
    """Characters of the texts in a value."""
    if isinstance(value, dict | list):
        return sum(map(_characters, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str | bytes) else 8


def _bomb(path: Path) -> OlpackError:
    return OlpackError(f"{path} unpacks to more than {_MOST_TIMES} times its size.", _UNPACKED)


def without_nulls(value: Any) -> Any:
    """A row of an Arrow table without the nulls with which it fills the keys that one object lacks and another has."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value
