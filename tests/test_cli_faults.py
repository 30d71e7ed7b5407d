"""Signals that end a command, and machines on which nothing can be written: exit codes and sentences."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# A command that waits, as every stage does between two of its steps, and one that defers an interrupt, as training does.
COMMANDS = """
import signal, sys, time
from olpack import cli

@cli.app.command()
def wait() -> None:
    try:
        print("ready", flush=True)
        time.sleep(600)
    finally:
        print("cleaned up", flush=True)

@cli.app.command()
def defer() -> None:
    asked = []
    before = signal.signal(signal.SIGINT, lambda *_: asked.append(1))
    print("ready", flush=True)
    while not asked:
        time.sleep(0.01)
    signal.signal(signal.SIGINT, before)
    print("checkpoint written", flush=True)
    raise KeyboardInterrupt

cli.main()
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **more}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize(("command", "text"), [("wait", "cleaned up"), ("defer", "checkpoint written")])
def test_signals_end_a_command_as_ctrl_c_does(number, code, command, text):
    own = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what a shell's job in the background ignores
    process = subprocess.Popen(
        [sys.executable, "-c", own + COMMANDS, command],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        restore_signals=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (code, text), err
    assert "Traceback" not in err


def test_a_signal_that_is_ignored_stays_ignored():
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + COMMANDS
    process = subprocess.Popen([sys.executable, "-c", code, "wait"], env=environment(), stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def failure(code: str, **variables: str) -> str:
    env = environment(**variables)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_no_home_folder_is_one_sentence():
    code = (
        "import os, pwd, sys; del os.environ['HOME']; os.getuid = lambda: 4242424; sys.argv = ['olpack', 'list']; from olpack import cli; cli.main()"
    )
    assert failure(code) == "olpack: This user has no home folder, and HOME is not set. Set HOME to a folder that this user can write to.\n"


@pytest.mark.parametrize("body", ["from olpack.workspace import scratch; scratch().__enter__()", "import tempfile; tempfile.mkdtemp()"])
def test_no_temporary_folder_is_one_sentence(body):
    code = f"""
import os, sys, tempfile
from olpack import cli
tempfile._candidate_tempdir_list = lambda: ["/proc/nowhere"]
cli.app = lambda *_, **__: exec({body!r})
cli.main()
"""
    text = "olpack: No temporary folder can be written to. Set TMPDIR to a folder that can, and that has some free space.\n"
    assert failure(code) == text


def test_a_read_only_folder_is_one_sentence():
    code = """
from pathlib import Path
from olpack import cli
cli.app = lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system", "/cache/file"))
cli.main()
"""
    sentence = "olpack: /cache/file: Read-only file system. Give this user access to it, or name another folder"
    assert failure(code).startswith(sentence)


def test_a_terminal_that_is_not_utf_8_gets_escapes(tmp_path):
    package = tmp_path / "modelfiles/مساعد"
    package.mkdir(parents=True)
    (package / "recipe.yaml").write_text("base: builtin/tiny-coder\ndata: {train: train.jsonl}\n")
    arguments = [sys.executable, "-m", "olpack", "list"]
    done = subprocess.run(
        arguments, cwd=tmp_path, env=environment(PYTHONIOENCODING="ascii", OLLAMA_HOST="127.0.0.1:9"), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and r"\u0645\u0633\u0627\u0639\u062f" in done.stdout
