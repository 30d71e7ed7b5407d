"""The parent's end of the worker: starts the process, hands it jobs, shows its progress, and cleans up after it."""

from __future__ import annotations

import glob
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

import psutil

from olpack import progress, workers
from olpack.errors import OlpackError
from olpack.export.job import ExportedFile, ExportedPart, ExportOptions, ExportPlan, Target, TokenDifference, TokenText, partial_path, remove_partial
from olpack.llamacpp.library import INSTALL
from olpack.llamacpp.source import converter_source
from olpack.quants import check_tensor_types, quant_type


class Converter:
    """A worker process with llama.cpp's converter in it. Starting one takes some seconds; it serves any number of jobs.

        with Converter() as converter:
            converter.check(base, ["Q4_K_M"])

    Raises:
        OlpackError: the converter cannot be had (see `converter_source`).
    """

    def __init__(self):
        source = converter_source()
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 — closed with the worker
        self._process = subprocess.Popen(
            workers.command("olpack.export.worker", str(source)),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
        )

    def __enter__(self) -> Converter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        self._process.stdout.close()
        self._log.close()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it takes jobs."""
        return self._process.poll() is None

    def check(
        self, source: Path, quants: Sequence[str], *, out: Path | None = None, texts: Sequence[TokenText] = (), **options: Unpack[ExportOptions]
    ) -> ExportPlan:
        """As `olpack.export.check_export`."""
        found = self._do(
            "checking the model",
            "texts",
            do="check",
            source=_text(source),
            quants=[quant_type(name).name for name in quants],
            out=_text(out),
            texts=[asdict(text) for text in texts],
            options=_as_json(options),
        )
        return ExportPlan(**{**found, "differences": [TokenDifference(**one) for one in found["differences"]]})

    def export(self, source: Path, targets: Sequence[Target], **options: Unpack[ExportOptions]) -> list[ExportedFile]:
        """As `olpack.export.export`."""
        if not targets:
            return []
        wanted = [(quant_type(target.quant).name, target.path.absolute()) for target in targets]
        if options.get("sensitivity") is None and (budgets := [target.quant for target in targets if quant_type(target.quant).budget]):
            raise OlpackError(
                f"'{budgets[0]}' is a budget: its types are chosen by what they lose on rows of data.",
                "Name it among the `quants` of a recipe, and `olpack build` measures that.",
            )
        if len({path for _, path in wanted}) < len(wanted):
            raise OlpackError("Two quant types are to be written to the same file.", "Give each its own path.")
        for _, path in wanted:
            _make_place(path)
        try:
            files = self._do(
                f"exporting {', '.join(quant for quant, _ in wanted)}",
                do="export",
                source=_text(source),
                targets=[(quant, str(path)) for quant, path in wanted],
                options=_as_json(options),
            )
        except BaseException:
            for _, path in wanted:  # the worker removes them itself, unless it was killed
                remove_partial(partial_path(path, self.pid))
            raise
        return [_exported(fields) for fields in files]

    def collect(self, gguf: Path, rows: Sequence[Sequence[int]], out: Path, *, dataset: str, threads: int | None = None) -> None:
        """As `olpack.export.collect_importance`."""
        _make_place(out)
        found = self._do(
            "collecting the importance matrix",
            "tokens",
            do="collect",
            gguf=_text(gguf),
            rows=[list(row) for row in rows],
            out=_text(out),
            dataset=dataset,
            threads=threads,
        )
        if found["unused"]:
            progress.warn(
                f"{found['unused']:,} of {found['experts']:,} experts' matrices were given no token by these rows: nothing is known of them, "
                "and the types that need an importance matrix will be poor there."
            )

    def measure(
        self,
        gguf: Path,
        rows: Sequence[Sequence[int]],
        loss_masks: Sequence[Sequence[bool]],
        out: Path,
        *,
        key: str,
        importance: Path | None = None,
        threads: int | None = None,
    ) -> bool:
        """As `olpack.export.measure_sensitivity`."""
        _make_place(out)
        found = self._do(
            "measuring what each matrix loses",
            "tokens",
            do="measure",
            gguf=_text(gguf),
            rows=[list(row) for row in rows],
            loss_masks=[list(mask) for mask in loss_masks],
            importance=_text(importance),
            out=_text(out),
            key=key,
            threads=threads,
        )
        return found["finite"]

    def _do(self, title: str, unit: str = "B", **job: object) -> object:
        """Hand over a job, show its progress, and return its result or raise its error."""
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            with ExitStack() as shown:
                task = None
                for line in self._process.stdout:
                    message = json.loads(line)
                    if "result" in message:
                        return message["result"]
                    if "error" in message:
                        raise OlpackError(**message["error"])
                    if "crash" in message:
                        failure = RuntimeError(f"the export worker failed, {message['crash'].strip().splitlines()[-1]}")
                        failure.add_note(message["crash"])  # shown with the traceback, which --debug asks for
                        raise failure
                    task = task or shown.enter_context(progress.task(title, total=message["total"], unit=unit))
                    task.advance(message["done"] - task.done)
        except BrokenPipeError:
            pass  # it died before it read the job
        except OlpackError:
            raise
        except BaseException:
            self._end(at_once=True)
            raise
        raise self._death()

    def _death(self) -> OlpackError:
        code = self._process.wait()
        self._log.seek(0)
        return workers.exit_error(
            "The export worker",
            code,
            self._log.read(),
            "Take another base, or report this with the model's name.",
            crash_remedy=f"Take another base, or, if every base crashes it, install the portable build of llama.cpp: {INSTALL}",
            memory_remedy="Close other programs and export again.",
        )

    def _end(self, *, at_once: bool = False) -> None:
        if at_once:
            self._process.terminate()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Shared:
    """The worker of a block of `one_worker`; None before its first job."""

    converter: Converter | None = None


_shared: _Shared | None = None


@contextmanager
def one_worker() -> Iterator[None]:
    """Within the block all jobs go to one worker, which starts with the first of them and ends with the outermost such block."""
    global _shared
    if _shared is not None:
        yield
        return
    _shared = mine = _Shared()
    try:
        yield
    finally:
        _shared = None
        if mine.converter is not None:
            mine.converter.__exit__()


@contextmanager
def worker() -> Iterator[Converter]:
    """The worker that the surrounding block of `one_worker` shares; without one, a worker of its own."""
    if _shared is None:
        with Converter() as converter:
            yield converter
        return
    if _shared.converter is None or not _shared.converter.alive:
        _shared.converter = Converter()
    yield _shared.converter


def environment() -> dict[str, str]:
    """The variables of the worker's process."""
    return {
        **workers.environment(),
        "MALLOC_MMAP_THRESHOLD_": str(4 << 20),  # glibc: tensors go back to the system at once; without it the peak is double
        "THP_MEM_ALLOC_ENABLE": "1",  # torch: large tensors in large pages, of which the system has to clear and map fewer
    }


def _make_place(path: Path) -> None:
    """Make the folder for a file, and remove what killed exports left of it there."""
    if path.is_dir():
        raise OlpackError(f"'{path}' is a folder, and a file is to be written there.", "Move it away, or name another file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise OlpackError(f"Nothing can be written in '{path.parent}': {error.strerror}.", "Name another folder.") from error
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = left.name.removesuffix(".partial").rpartition(".")[2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            remove_partial(left)


def _exported(fields: dict[str, Any]) -> ExportedFile:
    parts = [ExportedPart(**{**part, "path": Path(part["path"])}) for part in fields["parts"]]
    return ExportedFile(**{**fields, "path": Path(fields["path"]), "parts": parts})


def _as_json(options: ExportOptions) -> dict[str, Any]:
    """Options as the worker's job has them: paths as absolute text, and tensor types under llama.cpp's names."""
    if unknown := options.keys() - ExportOptions.__annotations__.keys():
        raise TypeError(f"no export option: {', '.join(sorted(unknown))}")
    job = {name: _text(value) if isinstance(value, Path) else value for name, value in options.items()}
    return {**job, "tensor_types": check_tensor_types(options.get("tensor_types") or {})}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(Path(path).absolute())
