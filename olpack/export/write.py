"""The pass itself: each tensor is loaded once, quantized once per type, and appended to every file.

    this thread     hands out tensor after tensor, as far ahead as the memory allows
    loaders         read tensors and merge the adapter into them, several at a time, because each is the work of one thread
    quantizers      take rows of what is loaded: each chunk to every type that some file needs, while it is in the cache, or on a GPU
    one per file    waits for the next tensor, and appends it
    one per file    hashes it

All the heavy calls (torch, ggml, write, SHA-256) release the GIL, so these really run at the same time.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from olpack.errors import OlpackError
from olpack.export.converter import FLOATS, SourceModel, SourceTensor
from olpack.export.plan import FilePlan, padded
from olpack.llamacpp import gpu_encoder, library
from olpack.llamacpp.grids import write_halves

MEMORY = 1 << 30  # bytes of tensors in memory, beside the largest one
CHUNK = 1 << 19  # weights that a thread quantizes at a time: 2 MB of float32
_FLUSH = 64 << 20  # bytes of a file after which the system is asked to write them to the disk


def write_files(
    model: SourceModel,
    files: Sequence[Sequence[tuple[FilePlan, Path]]],
    *,
    threads: int,
    round_to_bf16: bool = False,
    importance: Mapping[str, np.ndarray] = {},
    search: bool = False,
    encoder: gpu_encoder.GpuEncoder | None = None,
    rounded: Mapping[tuple[str, int], Path] = {},
    scales: Sequence[Path | None] = (),
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[str]]:
    """Write every planned file to its path, in one pass over the model's tensors. The tensors of `model` are used up.

    Args:
        model: the opened model.
        files: for each the parts that it consists of, mostly one: the plan of each, and its path. It is written in place: give
            temporary names. All files list the same tensors in the same order.
        threads: how many quantize.
        round_to_bf16: round what llama.cpp's converter would store in 16 bits first, as it would.
        importance: float32 [matrices, columns] by tensor name, the weight of each column's error; for a stack of experts one row each. It
            changes nothing in tensors of a type that has nothing to choose.
        search: search for scales that minimize the weighted error, instead of taking ggml's.
        encoder: a GPU's, which makes the types that it knows; without `search` only.
        rounded: by tensor name and type, the file of its blocks, which are taken in place of others.
        scales: for each file trained block scales, as `olpack.train.block_scales` writes them, or None; by default none has any.
        advance: gets the bytes of each write, from several threads.

    Returns:
        For each file the SHA-256 of its parts, in hex. The files are on the disk (fsync) by then.

    Raises:
        OlpackError: a weight that is infinite or not a number, one too large for a type, a disk that fills up.
    """
    memory = MemoryBudget()
    writers = [_FileWriter(parts, memory, advance, path) for parts, path in zip(files, scales or [None] * len(files), strict=True)]
    quantize = encoder.quantize_rows if encoder else partial(_on_the_cpu, search)
    chunk = gpu_encoder.CHUNK if encoder else CHUNK
    works = deque(
        _TensorJob(model.tensors.pop(name), [writer.types[name] for writer in writers], memory, quantize, chunk, rounded) for name in writers[0].types
    )
    memory.limit = MEMORY + max(work.nbytes for work in works)
    # Where a GPU quantizes, the cores are there for loading.
    loaders = ThreadPoolExecutor(threads if encoder else max(1, threads // 2), thread_name_prefix="load")
    quantizers = ThreadPoolExecutor(threads, thread_name_prefix="quantize")
    try:
        for writer in writers:
            writer.start()
        while works:
            work = works.popleft()
            memory.acquire(work.nbytes)
            work.loaded = loaders.submit(work.load, quantizers, round_to_bf16, importance.get(work.source.name))
            for writer in writers:
                writer.todo.put(work)
        for writer in writers:
            writer.todo.put(None)
        for writer in writers:
            writer.join()
        memory.check()
    except BaseException as error:
        memory.fail(error)
        raise
    finally:
        for pool in (loaders, quantizers):
            pool.shutdown(wait=True, cancel_futures=True)
        for writer in writers:
            writer.todo.put(None)
            writer.join()
    return [writer.digests for writer in writers]


# (rows, outs by type, importance) as in `GpuEncoder.quantize_rows`.
Quantize = Callable[[np.ndarray, Mapping[int, np.ndarray], "np.ndarray | None"], bool]


def _on_the_cpu(search: bool, rows: np.ndarray, outs: Mapping[int, np.ndarray], importance: np.ndarray | None) -> bool:
    return all(library.quantize_rows(type_, rows, out, importance, search=search) for type_, out in outs.items())


class MemoryBudget:
    """The bytes of tensors in memory, of at most `limit`, and the failure of a thread, which ends every wait."""

    def __init__(self) -> None:
        self.limit, self._used = 0, 0
        self._changed = threading.Condition()
        self.failure: BaseException | None = None

    def acquire(self, nbytes: int) -> None:
        """Wait until so many bytes are free within the limit, then take them. Raises the failure of another thread."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure or self._used + nbytes <= self.limit)
            self.check()
            self._used += nbytes

    def release(self, nbytes: int) -> None:
        """Give so many bytes back."""
        with self._changed:
            self._used -= nbytes
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure


class _TensorJob:
    """One tensor of the pass: its values, and its bytes in every type that some file needs.

    Attributes:
        nbytes: that it takes at most: what is read, that in float32, and what is made of it. The first two only until it is quantized.
    """

    def __init__(
        self,
        source: SourceTensor,
        types: Sequence[int],
        memory: MemoryBudget,
        quantize: Quantize,
        chunk: int,
        rounded: Mapping[tuple[str, int], Path],
    ):
        self.source = source
        self.types = sorted(set(types))
        self._memory, self._readers, self._left = memory, len(types), 0
        self._quantize_rows, self._chunk = quantize, chunk
        self._rounded = {type_: rounded[source.name, type_] for type_ in self.types if (source.name, type_) in rounded}
        self._lock = threading.Lock()
        columns = source.shape[-1] if source.shape else 1
        self._made = sum(source.elements // columns * library.row_size(type_, columns) for type_ in self.types)
        self._read = source.nbytes + 4 * source.elements if source.type_name in FLOATS else 0
        self.nbytes = self._read + self._made
        self.data: dict[int, np.ndarray] = {}
        self.loaded: Future[None] | None = None
        self._chunks: list[Future[None]] = []

    def load(self, quantizers: ThreadPoolExecutor, round_to_bf16: bool, importance: np.ndarray | None) -> None:
        """Read and merge the tensor, and hand its rows to the quantizers."""
        values = self.source.load()
        if self.source.type_name not in FLOATS:
            self.data = {self.types[0]: values}
            return
        rows, columns = values.shape
        for type_ in self.types:
            if type_ == library.tensor_type("f32"):
                self.data[type_] = values.view(np.uint8)
            elif self.source.stored is not None and type_ == self.source.stored[0]:
                self.data[type_] = self.source.stored[1]()
            elif type_ in self._rounded:
                self.data[type_] = np.fromfile(self._rounded[type_], np.uint8).reshape(rows, library.row_size(type_, columns))
            else:
                self.data[type_] = np.empty((rows, library.row_size(type_, columns)), np.uint8)
        step = max(1, self._chunk // columns)
        weights = [None] if importance is None else importance
        rows_of_one = rows // len(weights)  # a chunk is within one expert, because each has its own weights
        parts = [
            (slice(start, min(start + step, first + rows_of_one)), columns_weights)
            for first, columns_weights in zip(range(0, rows, rows_of_one), weights, strict=True)
            for start in range(first, first + rows_of_one, step)
        ]
        self._left = len(parts)
        self._chunks = [quantizers.submit(self._quantize, values, part, round_to_bf16, columns_weights) for part, columns_weights in parts]

    def wait(self) -> None:
        """Until `data` is complete. Raises what went wrong on the way."""
        assert self.loaded is not None  # a tensor is queued for the writers once its loading is submitted
        self.loaded.result()
        for chunk in self._chunks:
            chunk.result()

    def _quantize(self, values: np.ndarray, part: slice, round_to_bf16: bool, importance: np.ndarray | None) -> None:
        rows = values[part]
        prepare_weights(self.source, rows, round_to_bf16)
        complete = {library.tensor_type("f32"), *([self.source.stored[0]] if self.source.stored else []), *self._rounded}
        if not self._quantize_rows(rows, {type_: out[part] for type_, out in self.data.items() if type_ not in complete}, importance):
            raise too_large(self.source)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._memory.release(self._read)

    def written(self) -> None:
        """One file has what it needs. After the last one nothing of the tensor stays in memory."""
        with self._lock:
            self._readers -= 1
            last = self._readers == 0
        if last:
            self.data = {}
            self._memory.release(self._made)


def prepare_weights(source: SourceTensor, rows: np.ndarray, round_to_bf16: bool) -> None:
    """Check rows of a tensor before they are quantized, and round them to 16 bits in place where that is wanted.

    Raises:
        OlpackError: a weight is infinite or not a number.
    """
    import torch

    # A NaN carries through min and max, so two quick passes find every kind of unusable weight.
    if not (np.isfinite(rows.min()) and np.isfinite(rows.max())):
        raise OlpackError(
            f"The weight '{source.origin}' has an infinite or undefined value (inf or NaN).",
            "The base or the adapter is damaged, or its training diverged: take another checkpoint.",
        )
    if round_to_bf16 and source.type_name != "F32":
        values = torch.from_numpy(rows)
        values.copy_(values.to({"BF16": torch.bfloat16, "F16": torch.float16}[source.type_name]))


def too_large(source: SourceTensor) -> OlpackError:
    """The error for a tensor of which ggml's test finds the scales unsound."""
    return OlpackError(
        f"The weight '{source.origin}' has values that are too large to be quantized.",
        "Leave the quant types below 16 bits out, or take another checkpoint.",
    )


class _TrainedScales:
    """Block scales of one file's matrices."""

    def __init__(self, path: Path):
        from safetensors import safe_open

        self._tensors = safe_open(path, "numpy")
        self._names = set(self._tensors.keys())

    def of(self, name: str, type_: int, blocks: np.ndarray) -> np.ndarray:
        """The blocks of a matrix with the scales that the file has for it; the same array where it has none.

        Args:
            blocks: uint8 [rows, bytes of a row], which other files may take as they are.
        """
        if name not in self._names:
            return blocks
        own = blocks.copy()
        write_halves(library.type_name(type_), own, self._tensors.get_tensor(name))
        return own


class _FileWriter(threading.Thread):
    """Appends tensors to one file in order, part by part, and hashes what it writes."""

    def __init__(self, parts: Sequence[tuple[FilePlan, Path]], memory: MemoryBudget, advance: Callable[[int], None], scales: Path | None):
        super().__init__(name=f"write-{parts[0][0].quant.name}", daemon=True)
        self.types = {name: type_ for plan, _ in parts for name, type_, _ in plan.tensors}
        self.todo: queue.SimpleQueue[_TensorJob | None] = queue.SimpleQueue()
        self.digests: list[str] = []
        self._flushed = 0
        self._parts, self._memory, self._advance = parts, memory, advance
        self._scales = _TrainedScales(scales) if scales else None
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")

    def run(self) -> None:
        try:
            for plan, path in self._parts:
                with path.open("xb", buffering=0) as file:
                    self._flushed = 0
                    if not self._write(plan, file):
                        return
                    os.fsync(file.fileno())
        except OSError as error:
            failure = OlpackError(
                f"Writing '{self._parts[0][1].parent}' failed: {os.strerror(error.errno) if error.errno else error}.",
                "Free space on the disk, or name another folder.",
            )
            failure.__cause__ = error
            self._memory.fail(failure)
        except BaseException as error:  # whatever it is, the main thread must get it and end the pass
            self._memory.fail(error)
        finally:
            self._hasher.shutdown()

    def _write(self, plan: FilePlan, file: BinaryIO) -> bool:
        """Write one part; False where the pass ends early."""
        digest = hashlib.sha256()
        self._append(file, digest, plan.header)
        for _ in plan.tensors:
            work = self.todo.get()
            if work is None or self._memory.failure is not None:
                return False
            work.wait()
            data = work.data[self.types[work.source.name]]
            if self._scales:
                data = self._scales.of(work.source.name, self.types[work.source.name], data)
            data = data.reshape(-1)
            self._append(file, digest, data)
            self._append(file, digest, bytes(padded(data.nbytes) - data.nbytes))
            del data
            work.written()
            del work  # the next tensor may be long in coming
        self.digests.append(digest.hexdigest())
        return True

    def _append(self, file: BinaryIO, digest: hashlib._Hash, data: np.ndarray | bytes) -> None:
        view = memoryview(data) if isinstance(data, bytes) else data.data
        hashing = self._hasher.submit(digest.update, view)
        while view.nbytes:
            written = file.write(view)
            self._advance(written)
            view = view[written:]
            self._flush(file)
        hashing.result()

    def _flush(self, file: BinaryIO) -> None:
        """Have the system begin to write to the disk, instead of leaving gigabytes to the fsync at the end.

        With POSIX_FADV_DONTNEED Linux starts to write dirty pages, and keeps them in its cache until they are on the disk.
        """
        written = file.tell()
        if written - self._flushed >= _FLUSH and hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a file system that knows no such advice
                os.posix_fadvise(file.fileno(), self._flushed, written - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = written
