"""Workers die with their parent, an error says no more of a worker's death than what is known, and threads do not spin where others compute."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import olpack
from olpack import workers

REPOSITORY = Path(__file__).parents[1]
# A module of olpack's that a worker can run: it computes without ever giving up the GIL, and reports its process id.
COMPUTES = "import os; print(os.getpid(), flush=True); sum(iter(int, 1))"
PARENT = """
import subprocess, sys, time
from olpack import workers
worker = subprocess.Popen(workers.{kind}, env=workers.environment())
time.sleep(600)
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **more}


def ended(pid: int) -> bool:
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("kind", ["module", "program"])
def test_a_worker_that_computes_dies_with_its_parent(tmp_path, kind):
    (tmp_path / "computes.py").write_text(COMPUTES)
    words = 'command("computes")' if kind == "module" else f'program(sys.executable, "-c", {COMPUTES!r})'
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(kind=words)],
        env=environment(PYTHONPATH=os.pathsep.join([str(REPOSITORY), str(tmp_path)])),
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = int(parent.stdout.readline())
    assert not ended_now(worker)
    parent.kill()
    parent.communicate()
    assert ended(worker)


def ended_now(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_worker_whose_parent_has_died_already_does_not_begin():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    done = subprocess.run(
        [sys.executable, "-m", "olpack.workers", str(gone.pid), "--program", "echo", "began"], env=environment(), capture_output=True
    )
    assert (done.returncode, done.stdout) == (1, b"")


def test_where_the_kernel_binds_no_child_a_thread_watches_the_parent():
    watched = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    code = (
        "import psutil, sys, time; sys.platform = 'darwin'; from olpack import workers; "
        f"workers.die_with({watched.pid}); print(1, flush=True); time.sleep(600)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE)
    worker.stdout.readline()
    assert worker.poll() is None
    watched.kill()
    watched.wait()
    worker.communicate(timeout=60)
    assert worker.returncode == 1


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (3, 3, "The worker was killed by signal 9, and not because memory ran out. Run the same command again."),
        (3, 4, "The worker was killed by the system, because memory ran out. Close other programs."),
        (None, None, "The worker was killed by signal 9. The system does not report whether memory ran out. Close other programs."),
    ],
)
def test_the_kernel_is_asked_why_a_worker_was_killed(monkeypatch, before, after, text):
    counts = iter([before, after])
    monkeypatch.setattr(workers, "_kills_for_memory", lambda: next(counts))
    workers.command("a.module")
    error = workers.exit_error("The worker", -signal.SIGKILL, "", "Other.", memory_remedy="Close other programs.")
    assert str(error) == text


def test_the_kernels_count_is_read_here():
    count = workers._kills_for_memory()
    assert count is None or count >= 0


@pytest.mark.parametrize(
    ("load", "given", "spins"),
    [(0.0, {}, "1000"), (1000.0, {}, "0"), (1000.0, {"GOMP_SPINCOUNT": "7"}, "7"), (0.0, {"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_spin_briefly_and_on_a_busy_machine_not_at_all(monkeypatch, load, given, spins):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "environ", dict(given))
    runpy.run_path(olpack.__file__)
    assert os.environ.get("GOMP_SPINCOUNT") == spins
