"""Secrets of the environment are in no file and no output: of a whole build, of what is published, of runs that fail, with `--debug` and without."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from ollama_double import OllamaDouble
from oracle import make_workspace, write_base

SECRETS = {
    "HF_TOKEN": "hf_PLANTEDhubtokenPLANTED",
    "OLLAMA_API_KEY": "PLANTEDollamakeyPLANTED",
    "WANDB_API_KEY": "PLANTEDwandbkeyPLANTED",
    "HTTPS_PROXY": "http://PLANTEDuser:PLANTEDproxypassword@127.0.0.1:9",
    "HTTP_PROXY": "http://PLANTEDuser:PLANTEDproxypassword@127.0.0.1:9",
    "PIP_INDEX_URL": "https://__token__:PLANTEDindextoken@127.0.0.1:9/simple",
}
MARK = b"PLANTED"


class Arguments:
    """The arguments of all processes of a run, looked at while the block runs; those with the mark in them are kept.

    Attributes:
        run: in the environment of the run's processes, by which they are known.
    """

    def __enter__(self) -> Arguments:
        self.run = uuid.uuid4().hex
        self.leaks: set[bytes] = set()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ends.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ends.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = path.read_bytes()
                    ours = self.run.encode() in path.with_name("environ").read_bytes()
                except OSError:
                    continue
                if ours and MARK in line:
                    self.leaks.add(line)
            time.sleep(0.05)


def run(folder: Path, *words: str, server: str, code: int | None = None, **more: str) -> bytes:
    """Run the command line in a process of its own, with the secrets in its environment; what it printed."""
    credentials = server.replace("://", "://PLANTEDuser:PLANTEDserverpassword@")
    environment = os.environ | SECRETS | {"OLLAMA_HOST": credentials, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"} | more
    with Arguments() as arguments:
        environment["RUN_OF_A_TEST"] = arguments.run
        done = subprocess.run([sys.executable, "-m", "olpack", *words], cwd=folder, env=environment, capture_output=True)
    printed = done.stdout + done.stderr
    assert code is None or done.returncode == code, printed.decode()
    assert MARK not in printed, printed.decode()
    assert not arguments.leaks
    return printed


def leaks(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and MARK in path.read_bytes()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaDouble]:
    with OllamaDouble(tmp_path_factory.mktemp("server")) as double:
        yield double


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, server: OllamaDouble) -> Path:
    """A working folder after a whole build, every process of which had the secrets."""
    root = tmp_path_factory.mktemp("secrets")
    make_workspace(root, write_base(root / "model"))
    recipe = root / "modelfiles/oracle/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("epochs: 12", "epochs: 1"))
    for words in (["plan", "oracle"], ["build", "oracle"]):
        run(root, *words, server=server.url, code=0)
    return root


def test_a_whole_build_leaves_no_secret(built: Path, server: OllamaDouble) -> None:
    assert (built / "build/oracle/compare/report.html").is_file() and server.count("POST", "/api/create")
    assert leaks(built) == [] and leaks(server.store.root) == []


@pytest.mark.parametrize(
    "words",
    [
        ["show", "oracle"],
        ["show", "oracle", "--json"],
        ["list"],
        ["deploy", "oracle", "--check"],
        ["data", "check", "oracle"],
        ["run", "oracle:q8_0", "Hi"],
        ["bundle", "oracle"],
        ["compare", "oracle:q8_0", "--prompt", "Hi", "--out", "side"],
        ["--debug", "doctor"],
        ["schema"],
    ],
    ids=" ".join,
)
def test_other_commands_show_no_secret(built: Path, server: OllamaDouble, words: list[str]) -> None:
    run(built, *words, server=server.url)
    assert leaks(built) == []


@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["", "debug"])
@pytest.mark.parametrize(
    ("words", "more"),
    [
        (["show", "oracle"], {"OLLAMA_HOST": "http://PLANTEDuser:PLANTEDpassword@host:port"}),
        (["show", "oracle"], {"OLLAMA_HOST": "ftp://PLANTEDuser:PLANTEDpassword@host"}),
        (["deploy", "oracle"], {"OLLAMA_HOST": "PLANTEDuser:PLANTEDpassword@host.invalid:11434"}),
        (["deploy", "oracle"], {"OLLAMA_HOST": "http://PLANTEDuser:PLANTEDpassword@127.0.0.1:9"}),
        (["deploy", "oracle"], {"OLLAMA_HOST": "http://ollama.invalid", "HTTP_PROXY": "ftp://PLANTEDuser:PLANTEDpassword@127.0.0.1:9"}),
        (["deploy", "oracle"], {"OLLAMA_HOST": "http://ollama.invalid", "HTTP_PROXY": "http://PLANTEDuser:PLANTEDpassword@127.0.0.1:notaport"}),
        (["deploy", "oracle"], {"OLLAMA_HOST": "http://ollama.invalid", "ALL_PROXY": "socks9://PLANTEDuser:PLANTEDpassword@127.0.0.1:9"}),
        (["deploy", "oracle"], {"OLLAMA_API_KEY": "PLANTED\nkey", "OLLAMA_HOST": "http://127.0.0.1:9"}),
        (["deploy", "oracle"], {"OLLAMA_API_KEY": "PLANTEDkéy", "OLLAMA_HOST": "http://127.0.0.1:9"}),
        (["push", "oracle", "--hub", "me/oracle"], {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://PLANTEDuser:PLANTEDpassword@127.0.0.1:9"}),
        (["push", "oracle", "--ollama", "https://PLANTEDuser:PLANTEDpassword@registry.invalid/me"], None),
        (["plan", "oracle", "--set", "base=me/model"], {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://PLANTEDuser:PLANTEDpassword@127.0.0.1:9"}),
        (["estimate", "me/model"], {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://PLANTEDuser:PLANTEDpassword@127.0.0.1:9"}),
        (["estimate", "https://PLANTEDuser:PLANTEDpassword@host/model"], None),
    ],
)
def test_failing_runs_show_no_secret(built: Path, server: OllamaDouble, words: list[str], more: dict[str, str] | None, debug: list[str]) -> None:
    environment = os.environ | SECRETS | {"OLLAMA_HOST": server.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | (more or {})
    done = subprocess.run([sys.executable, "-m", "olpack", *debug, *words], cwd=built, env=environment, capture_output=True, timeout=120)
    assert done.returncode in (0, 1, 2)  # without a server, `show` shows what there is
    assert MARK not in done.stdout + done.stderr, (done.stdout + done.stderr).decode()
    assert leaks(built) == []


LIBRARY = """
import gc, logging, sys, threading, warnings
from olpack import cli
from olpack.commands import doctor

log = logging.getLogger("library")

def examine():
    def fail(*_):
        raise ValueError("PLANTEDhubtoken \\x1b[31m in an error")
    try:
        fail()
    except ValueError as error:
        log.exception("a record")
        log.error("another %s", "PLANTEDhubtoken", exc_info=error, stack_info=True)
    warnings.warn("a warning with PLANTEDhubtoken \\x1b[31m")
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    class Unraisable:
        __del__ = fail
    Unraisable()
    gc.collect()
    class Panic(BaseException):
        pass
    raise Panic("a panic with PLANTEDhubtoken \\x1b[31m")

doctor.examine = examine
sys.argv = ["olpack", *sys.argv[1:], "doctor"]
cli.main()
"""


@pytest.mark.parametrize("debug", [True, False])
def test_what_libraries_log_and_warn_of_shows_no_secret(tmp_path: Path, debug: bool) -> None:
    words = [sys.executable, "-c", LIBRARY, *(["--debug"] if debug else [])]
    environment = os.environ | SECRETS | {"HF_TOKEN": "PLANTEDhubtoken", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "PLANTED" not in done.stdout + done.stderr, done.stderr
    assert "\x1b" not in done.stderr
    for text in ("a record", "another ***", "ValueError: ***", "Stack (most recent call last)", "a panic with ***"):
        assert text in done.stderr, text
    assert ("a warning with ***" in done.stderr) == debug
    assert done.stderr.count("ValueError: ***") == 4  # two records, a thread, a finalizer
