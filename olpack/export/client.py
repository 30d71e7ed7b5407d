"""The client of the export worker: starts the process, sends it jobs, shows its progress, and removes what it left."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, TypeVar, Unpack

from pydantic import TypeAdapter

from olpack import progress, workers
from olpack.errors import OlpackError
from olpack.export.job import (
    LATER,
    ExportedFile,
    ExportOptions,
    ExportPlan,
    ImportanceCounts,
    RoundedMatrices,
    SensitivityResult,
    Target,
    TokenText,
    partial_path,
)
from olpack.llamacpp.library import INSTALL
from olpack.llamacpp.source import cached_source, converter_source
from olpack.quants import Rounding, check_tensor_types, quant_type
from olpack.workspace import remove, remove_leftovers

_Result = TypeVar("_Result")


class Converter:
    """A worker process with llama.cpp's converter in it. Starting one takes some seconds; it serves any number of jobs.

        with Converter() as converter:
            converter.check(base, ["Q4_K_M"])

    Raises:
        OlpackError: the converter cannot be fetched (see `converter_source`).
    """

    def __init__(self) -> None:
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
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._jobs: IO[str] = self._process.stdin
        self._messages: IO[str] = self._process.stdout
        self.has_gpu = False  # a part of whose memory is the process's until it ends

    def __enter__(self) -> Converter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process. Partial files of a job go with it."""
        self._end(at_once=True)
        self._messages.close()
        self._log.close()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it takes jobs."""
        return self._process.poll() is None

    def begin(self) -> None:
        """Import the converter now, while the caller does other work, and not with the first job."""
        with suppress(BrokenPipeError):  # it died, which the first job reports
            self._send({"do": "begin"})

    def check(
        self,
        source: Path,
        quants: Sequence[str],
        *,
        temporary: Sequence[str] = (),
        out: Path | None = None,
        texts: Sequence[TokenText] = (),
        **options: Unpack[ExportOptions],
    ) -> ExportPlan:
        """As `olpack.export.check_export`."""
        return self._do(
            ExportPlan,
            "checking the model",
            "texts",
            do="check",
            source=_text(source),
            quants=[quant_type(name).name for name in quants],
            temporary=[quant_type(name).name for name in temporary],
            out=_text(out),
            texts=[asdict(text) for text in texts],
            options=_as_json(options),
        )

    def export(self, source: Path, targets: Sequence[Target], **options: Unpack[ExportOptions]) -> list[ExportedFile]:
        """As `olpack.export.export`."""
        if not targets:
            return []
        wanted = [(quant_type(target.quant).name, target.path.absolute()) for target in targets]
        if options.get("sensitivity") is None and (budgets := [target.quant for target in targets if quant_type(target.quant).budget]):
            raise OlpackError(
                f"'{budgets[0]}' is a budget: its types are chosen by their losses on rows of data.",
                "Name it among the `quants` of a recipe, and `olpack build` measures that.",
            )
        if len({path for _, path in wanted}) < len(wanted):
            raise OlpackError("Two quant types have the same file as target.", "Give each its own path.")
        for _, path in wanted:
            _prepare_folder(path)
        try:
            return self._do(
                list[ExportedFile],
                f"exporting {', '.join(quant for quant, _ in wanted)}",
                do="export",
                source=_text(source),
                targets=[(quant, str(path)) for quant, path in wanted],
                options=_as_json(options),
            )
        except BaseException:
            for _, path in wanted:  # the worker removes them itself, unless it was killed
                remove(partial_path(path, self.pid))
            raise

    def collect(self, gguf: Path, rows: Sequence[Sequence[int]], out: Path, *, dataset: str, threads: int | None = None) -> None:
        """As `olpack.export.collect_importance`."""
        _prepare_folder(out)
        counts = self._do(
            ImportanceCounts,
            "collecting the importance matrix",
            "tokens",
            do="collect",
            gguf=_text(gguf),
            rows=[list(row) for row in rows],
            out=_text(out),
            dataset=dataset,
            threads=threads,
        )
        if counts.unused:
            progress.warn(
                f"{counts.unused:,} of {counts.experts:,} experts' matrices got no token from these rows, so their importance is unknown, "
                "and the types that need an importance matrix will be poor there."
            )

    def round(
        self, source: Path, quants: Sequence[str], gguf: Path, rows: Sequence[Sequence[int]], folder: Path, **options: Unpack[ExportOptions]
    ) -> RoundedMatrices:
        """As `olpack.export.round_matrices`."""
        _prepare_folder(folder / "blocks")
        made = self._do(
            RoundedMatrices,
            "rounding matrices",
            "weights",
            do="round",
            source=_text(source),
            quants=[quant_type(name).name for name in quants],
            gguf=_text(gguf),
            rows=[list(row) for row in rows],
            folder=_text(folder),
            options=_as_json(options),
        )
        for names, what in (
            (made.unread, "was multiplied with nothing but zeros on these rows; its scales are searched for"),
            (made.damped, "needed more damping than others for its second moments to be positive definite, so it gains less"),
        ):
            if names:
                more = f" (and {len(names) - 1} more matrices)" if len(names) > 1 else ""
                progress.warn(f"{names[0]}{more} {what}.")
        return made

    def measure(
        self,
        gguf: Path,
        rows: Sequence[Sequence[int]],
        loss_masks: Sequence[Sequence[bool]],
        out: Path,
        *,
        key: str,
        importance: Path | None = None,
        rounding: Rounding = "ggml",
        calibration: Sequence[Sequence[int]] = (),
        threads: int | None = None,
    ) -> bool:
        """As `olpack.export.measure_sensitivity`."""
        _prepare_folder(out)
        return self._do(
            SensitivityResult,
            "measuring what each matrix loses",
            "tokens",
            do="measure",
            gguf=_text(gguf),
            rows=[list(row) for row in rows],
            loss_masks=[list(mask) for mask in loss_masks],
            importance=_text(importance),
            rounding=rounding,
            calibration=[list(row) for row in calibration],
            out=_text(out),
            key=key,
            threads=threads,
        ).finite

    def _do(self, result: type[_Result], title: str, unit: str = "B", **job: object) -> _Result:
        """Send a job, show its progress, and return its result, which has the given type, or raise its error."""
        try:
            self._send(job)
            with ExitStack() as shown:
                task = None
                for line in self._messages:
                    message = json.loads(line)
                    if "event" in message:
                        if message["event"] == "warning":
                            progress.warn(message["text"])
                        continue
                    self.has_gpu = message.get("has_gpu", self.has_gpu)
                    if "result" in message:
                        return TypeAdapter(result).validate_python(message["result"])
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

    def _send(self, job: dict[str, Any]) -> None:
        self._jobs.write(json.dumps(job) + "\n")
        self._jobs.flush()

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
            self._jobs.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _SharedWorker:
    """The worker of the blocks of `one_worker`; None before its first job. `gpu_blocks` of those that are open let it have a GPU between two jobs."""

    converter: Converter | None = None
    gpu_blocks: int = 0

    def start(self) -> Converter:
        """The worker, which starts where it is not there or has died."""
        if self.converter is None or not self.converter.alive:
            self.end()
            self.converter = Converter()
        return self.converter

    def end(self) -> None:
        """End the worker, if it is there."""
        if self.converter is not None:
            self.converter.close()
            self.converter = None

    def release_gpu(self) -> None:
        """End a worker that has a GPU, where no block lets it."""
        if not self.gpu_blocks and self.converter is not None and self.converter.has_gpu:
            self.end()


# Of a thread: another one that calls olpack gets workers of its own.
_shared: ContextVar[_SharedWorker | None] = ContextVar("_shared", default=None)


@contextmanager
def one_worker(*, with_gpu: bool = True) -> Iterator[None]:
    """Within the block all jobs go to one worker, which starts with the first of them and ends with the outermost such block.

    Args:
        with_gpu: let a worker that used a GPU stay for the next job, with a part of the GPU's memory. Without, and outside of a block with, it
            ends after its job.
    """
    outer = _shared.get()
    shared = outer or _SharedWorker()
    _shared.set(shared)
    shared.gpu_blocks += with_gpu
    try:
        yield
    finally:
        shared.gpu_blocks -= with_gpu
        shared.release_gpu()
        if outer is None:
            _shared.set(None)
            shared.end()


@contextmanager
def worker() -> Iterator[Converter]:
    """The worker that the surrounding block of `one_worker` shares; without one, a worker of its own."""
    with one_worker(with_gpu=False):
        shared = _shared.get()
        assert shared is not None  # in such a block
        yield shared.start()


def begin_worker() -> None:
    """Have the worker of the surrounding block of `one_worker` import the converter while this process does other work. A converter that is to be
    fetched first comes with the first job."""
    shared = _shared.get()
    if shared is not None and shared.converter is None and cached_source() is not None:
        shared.start().begin()


def end_worker() -> None:
    """End the worker of the surrounding block, which has 0.2 GB of memory between two jobs, too. The next job starts another."""
    if (shared := _shared.get()) is not None:
        shared.end()


def environment() -> dict[str, str]:
    """The variables of the worker's process."""
    return {
        **workers.environment(),
        "MALLOC_MMAP_THRESHOLD_": str(4 << 20),  # glibc: tensors go back to the system at once; without it the peak is double
        "THP_MEM_ALLOC_ENABLE": "1",  # torch: large tensors in large pages, of which the system has to clear and map fewer
    }


def _prepare_folder(path: Path) -> None:
    """Make the folder for a file, and remove the partial files of killed exports from it."""
    if path.is_dir():
        raise OlpackError(f"'{path}' is a folder, so no file can be written there.", "Move it away, or name another file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise OlpackError(f"Nothing can be written in '{path.parent}': {error.strerror}.", "Name another folder.") from error
    remove_leftovers(path.parent, path.name)


def _as_json(options: ExportOptions) -> dict[str, Any]:
    """Options as the worker's job has them: paths as absolute text, and tensor types under llama.cpp's names."""
    if unknown := options.keys() - ExportOptions.__annotations__.keys():
        raise TypeError(f"no export option: {', '.join(sorted(unknown))}")
    job = {name: _text(value) if isinstance(value, Path) else value for name, value in options.items()}
    if (scales := options.get("scales", {})) != LATER:
        job["scales"] = {quant_type(quant).name: _text(path) for quant, path in scales.items()}
    return {**job, "tensor_types": check_tensor_types(options.get("tensor_types") or {})}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(Path(path).absolute())
