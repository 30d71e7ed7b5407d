"""One way to show long work: bars on a terminal, plain lines in a log, JSON lines on request. All of it goes to stderr.

with progress.task("uploading q4_K_M", total=size, unit="B") as task:
    for chunk in chunks:
        task.advance(len(chunk))
progress.say("registered coding-assistant:q4_K_M")
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TextIO

from olpack.printable import console, echo, json_text, redacted

Mode = Literal["auto", "bars", "lines", "json"]
Level = Literal["quiet", "normal", "verbose"]

_LINE_EVERY_S = 10.0  # a log gets one line per task in this time, and one at its end
_mode: Literal["bars", "lines", "json"] = "lines"
_level: Level = "normal"
_out: TextIO | None = None  # where JSON lines go; None: stderr
_every_s = _LINE_EVERY_S
_bars = None  # the rich Progress on screen while any task runs


def use(mode: Mode, *, out: TextIO | None = None, every: float = _LINE_EVERY_S) -> None:
    """Choose how the process shows its work. `auto` means bars where stderr is a terminal, lines elsewhere.

    Args:
        out: where JSON lines go instead of stderr.
        every: seconds from one line of a task to its next.
    """
    global _mode, _out, _every_s
    _out, _every_s = out, every
    _mode = ("bars" if sys.stderr.isatty() else "lines") if mode == "auto" else mode


def show(level: Level) -> None:
    """Choose how much the process shows: "quiet" is warnings alone, and "verbose" is details, too."""
    global _level
    _level = level


def say(text: str, **fields: object) -> None:
    """One line of news. `fields` are carried in JSON mode only."""
    if _level != "quiet":
        _emit("say", text, fields)


def detail(text: str) -> None:
    """One line for those who asked for more: why a stage runs, which requests go to a server."""
    if _level == "verbose":
        _emit("detail", text, {})


def warn(text: str) -> None:
    """One line that the user should act on, sooner or later."""
    _emit("warning", text, {})


def _emit(kind: str, text: str, fields: dict[str, object]) -> None:
    text = redacted(text)
    if _mode == "json":
        _print_json({"event": kind, "text": text, **fields})
    else:
        line = f"warning: {text}" if kind == "warning" else text
        if _bars is not None:
            _bars.console.print(line, markup=False, highlight=False, soft_wrap=True, style="yellow" if kind == "warning" else None)
        else:
            echo(line, err=True)


def _prints_lines() -> bool:
    return _mode != "bars" and _level != "quiet"


def _print_json(record: dict[str, Any]) -> None:
    out = _out or sys.stderr
    out.write(json_text(record) + "\n")  # at once, as another thread may write a line, too
    out.flush()


class ProgressTask:
    """A piece of work under way: how much is done, how fast, how long it still takes."""

    def __init__(self, title: str, total: float | None, unit: str, done: float):
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.note = ""
        self._first = done
        self._started = self._printed = time.monotonic()
        self._shown: float | None = None
        self._bar = None

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Add to what is done. `note` is a short figure shown beside the bar, such as "loss 1.23"."""
        self.done += amount
        if note is not None:
            self.note = note
        if self._bar is not None:
            _bars.update(self._bar, completed=self.done, note=self._figures())
        elif _prints_lines() and time.monotonic() - self._printed >= _every_s:
            self._print()

    @property
    def rate(self) -> float:
        """Units per second since the task began here (work done before a resume does not count)."""
        return (self.done - self._first) / max(time.monotonic() - self._started, 1e-9)

    def _figures(self) -> str:
        return "  ".join(filter(None, [f"{quantity(self.rate, self.unit)}/s" if self.done > self._first else "", self.note]))

    def _print(self) -> None:
        self._printed, self._shown = time.monotonic(), self.done
        if _mode == "json":
            record = {
                "event": "progress",
                "task": self.title,
                "done": self.done,
                "total": self.total,
                "unit": self.unit,
                "rate": round(self.rate, 3),
                "note": self.note,
            }
            _print_json(record)
            return
        if self.total is None and not self.unit:
            echo(f"{self.title}  {self.note}".rstrip(), err=True)
            return
        of = f" of {quantity(self.total, self.unit)}" if self.total else ""
        left = ""
        if self.total and self._first < self.done < self.total:
            left = f"  {duration((self.total - self.done) / self.rate)} left"
        line = f"{self.title}: {quantity(self.done, self.unit)}{of}  {self._figures()}{left}"
        echo(line, err=True)


@contextmanager
def task(title: str, total: float | None = None, unit: str = "", done: float = 0) -> Iterator[ProgressTask]:
    """Show a piece of work for as long as the block runs.

    Args:
        title: what is being done, in a few words.
        total: how much there is to do, in `unit`; None where nobody knows.
        unit: "B" for bytes, else a plural noun ("tokens", "rows").
        done: how much was done before (a resumed run).
    """
    global _bars
    shown = ProgressTask(title, total, unit, done)
    mine = False
    if _mode == "bars" and _level != "quiet":
        if _bars is None:
            _bars, mine = _make_bars(), True
            _bars.start()
        shown._bar = _bars.add_task(title, total=total, completed=done, note="")
    try:
        yield shown
        if _prints_lines() and shown._shown != shown.done:
            shown._print()
    finally:
        if shown._bar is not None:
            _bars.remove_task(shown._bar)
        if mine and _bars is not None:
            _bars.stop()
            _bars = None


class Relay:
    """Shows the events of another process, JSON lines, in this process's own way.

    with Relay() as relay:
        for line in worker.stdout:
            relay.show(json.loads(line))
    """

    def __init__(self) -> None:
        self._tasks: dict[str, tuple[ExitStack, ProgressTask]] = {}

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *exception: object) -> None:
        for title in list(self._tasks):
            self._close(title)

    def show(self, event: dict[str, Any]) -> None:
        """Show one event. A task begins with its first line and ends where all of it is done, or with the block."""
        if event["event"] == "say":
            say(event["text"], **{name: value for name, value in event.items() if name not in ("event", "text")})
        elif event["event"] == "warning":
            warn(event["text"])
        elif event["event"] == "detail":
            detail(event["text"])
        elif event["event"] == "progress":
            title, total, done = event["task"], event["total"], event["done"]
            if title not in self._tasks:
                stack = ExitStack()
                self._tasks[title] = stack, stack.enter_context(task(title, total, event["unit"], done))
            shown = self._tasks[title][1]
            shown.advance(done - shown.done, note=event["note"])
            if total is None or done >= total:
                self._close(title)

    def _close(self, title: str) -> None:
        self._tasks.pop(title)[0].close()


def _make_bars():
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console(stderr=True),
        transient=True,
    )


def quantity(amount: float, unit: str = "") -> str:
    """1.2 GB, 340 tokens, 12.5 rows: bytes in decimal units, anything else with its noun."""
    if unit == "B":
        for name in ("B", "kB", "MB", "GB", "TB"):
            if abs(amount) < 1000 or name == "TB":
                return f"{amount:.0f} {name}" if name == "B" else f"{amount:.1f} {name}"
            amount /= 1000
    number = f"{amount:,.0f}" if amount >= 100 or amount == int(amount) else f"{amount:.1f}"
    return f"{number} {unit}".strip()


def duration(seconds: float) -> str:
    """4.2 s, 3 min 10 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
