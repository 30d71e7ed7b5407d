"""The files of packages and builds, and how they are written whole: packages, templates, the build folder, atomic writes, digests, the lock.

modelfiles/NAME/recipe.yaml         what the user writes (the one in the working folder wins over the shipped one)
templates/Modelfile.j2              likewise
build/NAME/adapter/                 what training made
build/NAME/gguf/NAME-Q4_K_M.gguf    what export made
build/NAME/importance.gguf          the importance matrix, where one was collected
build/NAME/sensitivity.json         what each matrix loses when it is rounded, where a budget was given
build/NAME/rounded/                 matrices rounded for the next quants, until those are complete
build/NAME/modelfiles/q4_K_M.Modelfile
build/NAME/compare/results.json, report.html
build/NAME/stages/*.json            which inputs each of these was made from
build/bases/BASE-DIGEST/            a build folder of quants without an adapter, which adapter packages share
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from olpack import progress
from olpack.errors import OlpackError

PACKAGE = Path(__file__).parent
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""What a model or a data set on the Hugging Face Hub is named by: owner/name."""
CHUNK = 1 << 20
_SAME_TIME_NS = 20_000_000  # two writes that are closer may leave a file with the same times
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(?P<kind>tmp|old|partial)")  # of `unfinished`, and of an export
_SCRATCH = re.compile(r"olpack-(?P<pid>\d+)-\w+")
_AT_WORKING_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_digests: dict[tuple[int, ...], str] = {}  # of files as they are, by what a write changes

# What transformers, the tokenizer or llama.cpp's converter reads of a model, and what such a folder has besides when it comes from the Hub.
_MODEL_FILES = (
    "config.json",
    "*_config.json",
    "model*.safetensors",
    "adapter_model*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "*.model",
    "*.model.v*",
    "tekken.json",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "*.jinja",
    "configuration.json",
    "params.json",
    "LICENSE*",
)


def shipped(kind: str) -> Path:
    """The `examples`, `modelfiles` or `templates` that came with olpack: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def recipe_path(name: str) -> Path:
    """The recipe of a package: the working folder's own first, then the shipped one.

    Raises:
        OlpackError: there is no such package; the names that exist are listed.
    """
    for root in (Path("modelfiles"), shipped("modelfiles")):
        path = root / name / "recipe.yaml"
        if path.is_file():
            return path
    check_package(name)
    known = ", ".join(packages()) or "none"
    raise OlpackError(f"There is no modelfiles/{name}/recipe.yaml here, and olpack comes with none of that name.", f"Packages: {known}.")


def check_package(name: str) -> None:
    """Raises OlpackError where a name is no single folder."""
    if Path(name).name != name:
        raise OlpackError(f"{name!r} cannot be the name of a package.", "A package is a folder in modelfiles/, such as coding-assistant.")


def named_from(folder: Path, given: str) -> str:
    """A path relative to the working folder as a recipe in `folder` names it."""
    path = Path(given).expanduser()
    return str(path) if path.is_absolute() else os.path.relpath(path.resolve(), folder.resolve())


def packages() -> list[str]:
    """Names of the packages that `recipe_path` finds, sorted."""
    roots = (Path("modelfiles"), shipped("modelfiles"))
    return sorted({path.parent.name for root in roots for path in root.glob("*/recipe.yaml")})


def template_source(name: str) -> str:
    """The text of a template, from the working folder's `templates/` or the shipped ones."""
    own = Path("templates") / name
    path = own if own.is_file() else shipped("templates") / name
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OlpackError(f"{path} is not UTF-8 (byte {error.start}).", "Save it as UTF-8.") from None


@dataclass(frozen=True)
class BuildPaths:
    """The folder of one build, and the paths in it.

    Attributes:
        name: of the package, or of a shared base.
        root: the folder.
        base: of a package that consists of an adapter: the folder of its base's quants.
        served: of an adapter on a GGUF: that file, which is served as it is in place of quants.
    """

    name: str
    root: Path
    base: BuildPaths | None = None
    served: Path | None = None

    def home(self, unit: str) -> BuildPaths:
        """Where a step leaves its record and its outputs: the quants of an adapter package are those of its base."""
        return self.base if self.base and unit.startswith("export-") and unit != "export-adapter" else self

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    def gguf(self, quant: str) -> Path:
        if self.served and quant != "adapter":
            return self.served
        home = self.home(f"export-{quant}")
        return home.root / "gguf" / f"{home.name}-{quant}.gguf"

    @property
    def importance(self) -> Path:
        return self.root / "importance.gguf"

    @property
    def importance_source(self) -> Path:
        return self.root / "importance-source.gguf"

    @property
    def sensitivity(self) -> Path:
        return self.root / "sensitivity.json"

    @property
    def sensitivity_source(self) -> Path:
        return self.root / "sensitivity-source.gguf"

    @property
    def rounded(self) -> Path:
        """Blocks of the matrices that are rounded on training rows, in a folder for each set of inputs, until the quants with them are complete."""
        return self.root / "rounded"

    @property
    def rounding_source(self) -> Path:
        return self.root / "rounding-source.gguf"

    def modelfile(self, tag: str) -> Path:
        return self.root / "modelfiles" / f"{tag}.Modelfile"

    @property
    def compare(self) -> Path:
        return self.root / "compare"

    @property
    def temporary(self) -> Path:
        """Of a comparison, for as long as it runs."""
        return self.compare / "temporary"

    @property
    def results(self) -> Path:
        return self.compare / "results.json"

    @property
    def report(self) -> Path:
        return self.compare / "report.html"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    def stage(self, unit: str) -> Path:
        return self.root / "stages" / f"{unit}.json"


def unfinished(path: Path, kind: str = "tmp") -> Path:
    """Where this process writes a file or a folder until it is whole: beside its place. `remove_leftovers` knows such names."""
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file that is there whole or not at all, also across a power cut. A link in its place is replaced and not followed."""
    temporary = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # x: a link that somebody put there is an error
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OlpackError(f"{path} could not be written: {error.strerror}.", "Free some space, or choose another folder with --out.") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and vanishes when it does not.

    Where the system can exchange two names at once (Linux), there is a whole folder at `path` at every moment. Elsewhere the old one has another
    name for a moment, from which `remove_leftovers` puts it back. The files get the permissions that the umask allows, whoever wrote them.
    """
    temporary, old = unfinished(path), unfinished(path, "old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        temporary.mkdir()
        mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # safetensors makes files that only their owner can read
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        if not os.path.lexists(path):
            os.replace(temporary, path)
        elif not _exchange(temporary, path):
            os.replace(path, old)
            os.replace(temporary, path)
    except OSError as error:
        raise OlpackError(f"{path} could not be written: {error.strerror}.", "Free some space, or choose another folder with --out.") from None
    finally:
        if os.path.lexists(old) and not os.path.lexists(path):
            os.replace(old, path)
        remove(old)
        remove(temporary)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names of one file system in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library of before 2018
        return False
    return rename(_AT_WORKING_FOLDER, os.fsencode(first), _AT_WORKING_FOLDER, os.fsencode(second), _EXCHANGE) == 0


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if there is one. What cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str | None = None, *, idle: bool = False) -> None:
    """Remove what killed processes left unfinished in a folder; a folder that one of them had just moved away is put back.

    Args:
        folder: its own entries are looked at, and those of no folder in it.
        name: only what is to become a file or folder of this name.
        idle: this process writes nothing there now, so what has its id is of an earlier process with the same.
    """
    with suppress(OSError):
        for path in list(folder.iterdir()):
            match = _UNFINISHED.fullmatch(path.name)
            if match is None or name not in (None, match["name"]) or (_runs(int(match["pid"])) and not (idle and int(match["pid"]) == os.getpid())):
                continue
            place = path.with_name(match["name"])
            if match["kind"] == "old" and not os.path.lexists(place):
                os.replace(path, place)
            else:
                remove(path)


def _runs(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for temporary files that only this user can enter. What killed processes left in such folders is removed.

    Raises:
        OlpackError: no temporary folder can be written to.
    """
    _remove_scratch()
    try:
        made = tempfile.TemporaryDirectory(prefix=f"olpack-{os.getpid()}-", ignore_cleanup_errors=True)
    except OSError as error:
        raise OlpackError("No temporary folder can be written to.", "Set TMPDIR to a folder that can, and that has some free space.") from error
    with made as folder, _claimed(Path(folder)):
        yield Path(folder)


@functools.cache
def _remove_scratch() -> None:
    """Remove the scratch folders of dead processes, once in a process. A lock shows those that a process of another container uses."""
    with suppress(OSError):
        for path in list(Path(tempfile.gettempdir()).iterdir()):
            match = _SCRATCH.fullmatch(path.name)
            if match and not _runs(int(match["pid"])) and is_private(path):
                with suppress(OSError), _claimed(path):
                    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Lock a folder for as long as the block runs.

    Raises:
        BlockingIOError: another process has locked it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(opened)


def check_home() -> None:
    """Raises OlpackError where this user has no home folder, in which the libraries would make a folder named `~`."""
    if not os.path.isabs(os.path.expanduser("~")):  # noqa: PTH111, PTH117 — Path's raises
        raise OlpackError("This user has no home folder, and HOME is not set.", "Set HOME to a folder that this user can write to.")


def user_cache() -> Path:
    """The folder of what is made once for this user: libraries and code, which only this user may be able to change. It need not exist.

    Raises:
        OlpackError: it belongs to another user, or others may write to it and this user cannot forbid it.
    """
    import platformdirs

    path = Path(platformdirs.user_cache_dir("olpack")).resolve()
    if not path.exists() or is_private(path):
        return path
    try:
        if path.stat().st_uid != os.getuid():
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)
    except OSError:
        raise OlpackError(
            f"Other users can put code into the cache folder {path}.", "Make it your own, or set XDG_CACHE_HOME to another folder."
        ) from None
    return path


def make_user_cache() -> Path:
    """`user_cache`, made where it does not exist.

    Raises:
        OlpackError: as `user_cache`, or it cannot be made or written to.
    """
    path = user_cache()
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OlpackError(
            f"Nothing can be written in the cache folder {path}: {error.strerror}.",
            "Give this user access to it, or set XDG_CACHE_HOME to another folder.",
        ) from None
    return path


def is_private(path: Path) -> bool:
    """Whether a file or a folder, and no link, belongs to this user and nobody else can write to it."""
    status = path.lstat()
    if sys.platform == "win32":
        return True
    return not stat.S_ISLNK(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Only one olpack at a time works in a build folder. What a killed one left there unfinished is removed first.

    Raises:
        OlpackError: another process holds the lock.
    """
    import filelock

    lock = filelock.FileLock(root / ".lock", timeout=0)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise OlpackError(f"Another olpack is working in {root}.", "Wait for it, or build into another folder with --out.") from None
    except OSError as error:
        raise OlpackError(f"{root} cannot be used as a build folder: {error.strerror}.", "Choose another with --out.") from None
    try:
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())]:
            remove_leftovers(folder, idle=True)
        yield
    finally:
        lock.release()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits. A process reads a file once, as long as nothing writes to it."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if state not in _digests:
            settled = time.time_ns() - status.st_ctime_ns > _SAME_TIME_NS
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if not settled:
                return digest
            _digests[state] = digest
        return _digests[state]


def shown_digest(path: Path, title: str) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits, with progress."""
    digest = hashlib.sha256()
    with path.open("rb") as file, progress.task(title, path.stat().st_size, "B") as task:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            task.advance(len(chunk))
    return digest.hexdigest()


def value_digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """Identity of a model folder in well under a second, whatever its size.

    A file that is no part of a model, such as notes or a GGUF made from it, does not count.
    Files up to 16 MiB are read whole; of a larger one (weights) the size, both ends and 64 slices of 4 KiB spread evenly.
    Every step of training moves almost every weight, so two models that differ have different fingerprints; a flipped bit is not,
    and need not be: it is a key, not a checksum.
    """
    digest = hashlib.sha256()
    for path in _model_files(folder):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        _add_samples(digest, path)
    return digest.hexdigest()


def files_fingerprint(paths: Iterable[Path]) -> str:
    """As `folder_fingerprint`, of single files, whatever their names."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.stat().st_size}\0".encode())
        _add_samples(digest, path)
    return digest.hexdigest()


def _add_samples(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= 16 * CHUNK:
            digest.update(file.read())
            return
        digest.update(file.read(CHUNK))
        for index in range(64):
            file.seek(CHUNK + index * (size - 2 * CHUNK) // 64)
            digest.update(file.read(4096))
        file.seek(size - CHUNK)
        digest.update(file.read(CHUNK))


def _model_files(folder: Path) -> Iterator[Path]:
    listed = "".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.safetensors.index.json")))
    for path in sorted(folder.iterdir()):
        known = any(fnmatchcase(path.name, pattern) for pattern in _MODEL_FILES) or (path.suffix == ".safetensors" and f'"{path.name}"' in listed)
        if known and path.is_file() and not path.name.startswith(".") and path.suffix.lower() != ".md":
            yield path


def free_bytes(path: Path) -> int:
    """Free space, in bytes, of the file system that `path` is or will be on."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free
