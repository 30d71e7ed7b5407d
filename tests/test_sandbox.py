"""Attacks of an answer on the machine, and what becomes of them. `python tests/test_sandbox.py` prints the table for this machine.

An attack is code that ends without an exception only if it reached what it wanted; those on memory, disk and time are stopped by limits.
"""

from __future__ import annotations

import errno
import itertools
import os
import platform
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from olpack.compare import answer_runner, sandbox
from olpack.errors import OlpackError

FILES, CALLS, SPACES = "landlock", "seccomp", "namespaces"
LIMITS = ""  # what stops an attack on every POSIX system
CONTAINER = (FILES, CALLS)  # in a container that gives no user namespaces


@dataclass(frozen=True)
class Attack:
    """What an answer tries.

    Attributes:
        code: {…} are the places of `Target`.
        stopped_by: protections each of which stops it alone; LIMITS: none is needed.
        harmless: whether it may run without the protections, to show that it is an attack.
    """

    code: str
    stopped_by: tuple[str, ...]
    harmless: bool = True


C = "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"
CONNECT = "import socket; s = socket.socket({family}, socket.{kind}); s.{action}"
CHILDREN = "import os, time\nfor _ in range({count}):\n    if not os.fork():\n        {does}\n        os._exit(0)\n"
ATTACKS = {
    "read the user's file": Attack("assert open('{file}').read()", (FILES,)),
    "read it through a symlink": Attack("import os; os.symlink('{file}', 'x'); assert open('x').read()", (FILES,)),
    "link the user's file into the folder": Attack("import os; os.link('{file}', '{folder}/y')", (FILES,)),
    "list the home folder": Attack("import os; assert os.listdir('{folder}')", (FILES,)),
    "read /etc/passwd": Attack("assert open('/etc/passwd').read()", (FILES,)),
    "write outside of the folder": Attack("open('{folder}/x', 'w').write('x')", (FILES,)),
    "append to the user's file": Attack("open('{file}', 'a').write('x')", (FILES,)),
    "truncate the user's file": Attack("import os; os.truncate('{file}', 0)", (FILES,), False),
    "delete the user's file": Attack("import os; os.unlink('{file}')", (FILES,), False),
    "make a folder in /tmp": Attack("import os; os.mkdir('{folder}/d')", (FILES,)),
    "read the parent's environment": Attack("assert b'=' in open('/proc/{pid}/environ', 'rb').read()", (FILES, SPACES)),
    "read the environment of every process": Attack(
        "import glob\nfor path in glob.glob('/proc/[0-9]*/environ'):\n    try:\n        if b'HF_TOKEN' in open(path, 'rb').read(): break\n"
        "    except OSError: pass\nelse: raise SystemExit\n",
        (FILES, SPACES),
    ),
    "find HF_TOKEN in its own environment": Attack("import os; assert 'HF_TOKEN' in os.environ", (LIMITS,)),
    "read the parent's memory": Attack("open('/proc/{pid}/mem', 'rb')", (FILES, SPACES)),
    "read the parent's open files": Attack("import os; assert os.listdir('/proc/{pid}/fd')", (FILES, SPACES)),
    "TCP": Attack("import socket; socket.create_connection(('127.0.0.1', {port}), 2)", (CALLS, SPACES)),
    "UDP": Attack("import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))", (CALLS, SPACES)),
    "listen on a port": Attack("import socket; socket.create_server(('127.0.0.1', 0))", (CALLS,)),
    "raw packets": Attack("import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", (CALLS,), False),
    "netlink": Attack("import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", (CALLS,)),
    "Unix socket": Attack("import socket; socket.socket(socket.AF_UNIX).connect('{folder}/socket')", (CALLS,)),
    "abstract Unix socket": Attack("import socket; socket.socket(socket.AF_UNIX).connect('\\0{name}')", (CALLS, SPACES, FILES)),
    "io_uring": Attack(C + "p = ctypes.create_string_buffer(120); assert c.syscall(425, 4, p) >= 0", (CALLS,)),
    "start a program": Attack("import subprocess; subprocess.run(['/bin/true'], check=True)", (CALLS, FILES)),
    "replace itself by a program": Attack("import os; os.execv('/bin/true', ['true'])", (LIMITS,)),
    "60 processes": Attack(CHILDREN.format(count=60, does="time.sleep(0.2)"), (CALLS,)),
    "a fork bomb": Attack("import os\nwhile True: os.fork()", (CALLS,), False),
    "a child that outlives": Attack(CHILDREN.format(count=1, does="os.setsid()\n        time.sleep(60)"), (CALLS,), False),
    "a thousand threads": Attack("import threading, time\nfor _ in range(1000): threading.Thread(target=time.sleep, args=[5]).start()", (LIMITS,)),
    "8 GB of memory": Attack("x = bytearray(8 << 30)", (LIMITS,)),
    "8 GB of memory through mmap": Attack("import mmap; x = mmap.mmap(-1, 8 << 30)", (LIMITS,)),
    "8 GB of memory through children": Attack(CHILDREN.format(count=16, does="x = bytearray(1 << 29); time.sleep(1)"), (CALLS,), False),
    "memory in shared segments": Attack(C + "assert c.shmget(0, 1 << 20, 0o1600) >= 0", (CALLS,), False),
    "memory in anonymous files": Attack("import os; os.memfd_create('x')", (CALLS,)),
    "a file of 1 GB": Attack("import os; os.truncate(os.open('x', os.O_CREAT | os.O_RDWR), 1 << 30)", (LIMITS,)),
    "a written file of 1 GB": Attack("f = open('x', 'wb')\nfor _ in range(1024): f.write(bytes(1 << 20))", (LIMITS,)),
    "40 MB in many files": Attack("for n in range(40): open(str(n), 'wb').write(bytes(1 << 20))", (SPACES,)),
    "2000 files": Attack("for n in range(2000): open(str(n), 'w').close()", (SPACES,)),
    "1000 open files": Attack("import os; x = [os.open('/dev/null', 0) for _ in range(1000)]", (LIMITS,)),
    "an endless loop": Attack("while True: pass", (LIMITS,)),
    "sleep": Attack("import time; time.sleep(600)", (LIMITS,)),
    "a recursion without end": Attack("import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()", (LIMITS,)),
    "a crash": Attack("import ctypes; ctypes.string_at(0)", (LIMITS,)),
    "an exit that looks like success": Attack("import os; os._exit(0)", (LIMITS,)),
    "output without end": Attack("import sys\nwhile True: sys.stderr.write('x' * 10**6)", (LIMITS,)),
    "a signal to the parent": Attack("import os; os.kill({pid}, 0)", (CALLS, SPACES)),
    "a signal to everything": Attack("import os; os.kill(-1, 0)", (CALLS,)),
    "a signal to the process before it": Attack("import os; os.kill(os.getppid() or 1, 0)", (CALLS,)),
    "a queued signal": Attack(C + "assert c.sigqueue({pid}, 0, 0) == 0", (CALLS, SPACES)),
    "a signal through a pidfd": Attack("import os, signal; signal.pidfd_send_signal(os.pidfd_open({pid}), 0)", (CALLS, SPACES)),
    "a file that signals the parent": Attack("import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {pid})", (CALLS, SPACES)),
    "ptrace": Attack(C + "assert c.ptrace(0x4206, {pid}, 0, 0) == 0", (CALLS, SPACES)),
    "process_vm_readv": Attack(
        C + "b = ctypes.create_string_buffer(8); v = (ctypes.c_void_p * 2)(ctypes.addressof(b), 8)\n"
        "c.process_vm_readv({pid}, v, 1, v, 1, 0); assert ctypes.get_errno() == 14",  # EFAULT: it looked there
        (CALLS, SPACES),
    ),
    "the parent's limits": Attack("import resource; resource.prlimit({pid}, resource.RLIMIT_NOFILE)", (CALLS, SPACES)),
    "the parent's priority": Attack("import os; os.setpriority(os.PRIO_PROCESS, {pid}, os.getpriority(os.PRIO_PROCESS, {pid}))", (CALLS, SPACES)),
    "the parent's processors": Attack("import os; os.sched_setaffinity({pid}, os.sched_getaffinity({pid}))", (CALLS, SPACES)),
    "higher limits": Attack("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", (CALLS, SPACES), False),
    "a mount": Attack(C + "assert c.mount(b'none', b'.', b'tmpfs', 0, None) == 0", (CALLS,), False),
    "a namespace of its own": Attack(C + "assert c.unshare(0x10000000) == 0", (CALLS,)),
    "another root folder": Attack("import os; os.chroot('.')", (CALLS,)),
    "BPF": Attack(C + "c.syscall(321, 0, 0, 0); assert ctypes.get_errno() != 1", (CALLS,), False),
    "the kernel's keys": Attack(C + "assert c.syscall(250, 0, -3, 1) >= 0", (CALLS,), False),
}
WORKS = {
    "the standard library": "import asyncio, bisect, collections, csv, dataclasses, datetime, decimal, functools, itertools, json, math, random, re, "
    "sqlite3, statistics, string, typing, unittest, zoneinfo",
    "packages": "import numpy; assert numpy.arange(4).sum() == 6",
    "threads": "import threading; t = threading.Thread(target=print); t.start(); t.join()",
    "asyncio": "import asyncio\nasync def f(): await asyncio.sleep(0); return 3\nassert asyncio.run(f()) == 3",
    "files in its folder": "import os, tempfile\nopen('x', 'w').write('ü'); assert open('x').read() == 'ü'\n"
    "os.mkdir('d'); os.rename('x', 'd/y'); tempfile.TemporaryFile().write(b'x')",
    "a database in its folder": "import sqlite3; sqlite3.connect('x.db').execute('create table t (n)')",
    "printing": "import sys; print('x' * 10**6); sys.stderr.write('x')",
    "time zones": "import datetime, zoneinfo; datetime.datetime.now(zoneinfo.ZoneInfo('UTC'))",
    "its own signals": "import signal; signal.signal(signal.SIGUSR1, lambda *_: None); signal.raise_signal(signal.SIGUSR1)",
    "randomness": "import os, random, secrets; os.urandom(8); secrets.token_hex(); open('/dev/urandom', 'rb').read(1)",
    "nothing to read": "import sys\nassert sys.stdin.read() == ''",
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    with made_target(tmp_path_factory.mktemp("home")) as made:
        yield made


@contextmanager
def made_target(folder: Path) -> Iterator[dict[str, object]]:
    """What the attacks aim at: a user's file, a process with HF_TOKEN, a port, two Unix sockets."""
    (folder / "secret.txt").write_text("secret")
    name = f"olpack-test-{os.getpid()}"
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={**os.environ, "HF_TOKEN": "hf_planted"})
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as abstract:
        named.bind(str(folder / "socket"))
        abstract.bind("\0" + name)
        named.listen()
        abstract.listen()
        yield {"folder": folder, "file": folder / "secret.txt", "pid": victim.pid, "port": tcp.getsockname()[1], "name": name}
    victim.kill()
    victim.communicate()


def succeeds(attack: Attack, target: dict[str, object], offered: tuple[str, ...]) -> bool:
    """Whether the attack reached what it wanted, with these protections."""
    (target["folder"] / "y").unlink(missing_ok=True)
    (target["folder"] / "d").rmdir() if (target["folder"] / "d").exists() else None
    code = attack.code
    for key, value in target.items():
        code = code.replace(f"{{{key}}}", str(value))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_planted")
        patch.setattr(sandbox, "protections", lambda: offered)
        return sandbox.asserts_hold(code, [], cpu_s=1, wall_s=3)


def alive() -> set[int]:
    """Processes in which an answer runs."""
    return {
        process.pid for process in psutil.process_iter(["cmdline", "status"])
        if str(Path(answer_runner.__file__).parent) in (process.info["cmdline"] or ()) and process.info["status"] != psutil.STATUS_ZOMBIE
    }  # fmt: skip


def offered_of(wanted: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in wanted if name in sandbox.protections())


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("wanted", [answer_runner.PROTECTIONS, CONTAINER], ids=["all", "container"])
def test_an_attack_is_stopped(name: str, wanted: tuple[str, ...], target: dict[str, object]) -> None:
    attack, offered, before = ATTACKS[name], offered_of(wanted), alive()
    if not attack.harmless and not set(attack.stopped_by) & {*offered, LIMITS}:
        return  # this machine has nothing against it, and it would do harm
    assert succeeds(attack, target, offered) is not bool(set(attack.stopped_by) & {*offered, LIMITS})
    assert not alive() - before
    assert (target["folder"] / "secret.txt").read_text().startswith("secret")


def test_without_the_protections_the_attacks_succeed(target: dict[str, object]) -> None:
    unreal = [name for name, attack in ATTACKS.items() if attack.harmless and LIMITS not in attack.stopped_by and not succeeds(attack, target, ())]
    assert os.getuid() != 0 or not unreal  # the limit of processes applies to no administrator, and chroot to no other user


@pytest.mark.parametrize("name", WORKS)
def test_what_answers_need_works(name: str) -> None:
    assert sandbox.asserts_hold(WORKS[name], [])


def test_each_protection_works_alone_and_with_the_others() -> None:
    for count in range(len(sandbox.protections()) + 1):
        for offered in itertools.combinations(sandbox.protections(), count):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sandbox, "protections", lambda offered=offered: offered)
                assert sandbox.asserts_hold("x = 1", ["assert x == 1"]) and not sandbox.asserts_hold("x = 1", ["assert x == 2"])


def test_the_folder_is_removed_and_was_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert sandbox.asserts_hold("import os; open('x', 'w').write('y')", ["assert os.listdir() == ['x']"])
    assert not list(tmp_path.iterdir())


def test_answers_die_with_olpack(tmp_path: Path) -> None:
    """Also where olpack is killed while the answer computes."""
    before = alive()
    code = "from olpack.compare.sandbox import asserts_hold; print('began', flush=True); asserts_hold('while True: pass', [], cpu_s=60, wall_s=60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout and parent.stdout.readline()
    while len(alive() - before) < (3 if SPACES in sandbox.protections() else 1):
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while alive() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive() - before


def test_a_sandbox_that_does_not_start_is_an_error_and_no_failed_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_runner, "__file__", __file__)
    with pytest.raises(OlpackError, match="The sandbox for answers does not start: .*answer_runner"):
        sandbox.asserts_hold("x = 1", [])


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_of_system_calls(machine: str) -> None:
    architecture, column = answer_runner._ARCHITECTURES[machine]

    def verdict(number: int, *arguments: int, architecture: int = architecture) -> int:
        """What the kernel answers: 0 it does it, else an error number."""
        data = struct.pack("=IIQ6Q", number, architecture, 0, *[*arguments, *[0] * 6][:6])
        place, value = 0, 0
        while True:
            code, if_true, if_false, constant = steps[place]
            if code == 0x06:
                return 0 if constant == 0x7FFF0000 else constant & 0xFFFF
            if code == 0x20:
                value = struct.unpack_from("=I", data, constant)[0]
            truth = {0x20: False, 0x15: value == constant, 0x35: value >= constant, 0x45: bool(value & constant)}[code]
            place += 1 + (if_true if truth else if_false)

    steps = answer_runner.seccomp_filter(machine, 7)
    named = {"read": (0, 63), "openat": (257, 56), "futex": (202, 98), "socketpair": (53, 199), "exit_group": (231, 94)}
    assert [verdict(pair[column]) for pair in named.values()] == [0] * 5
    assert verdict(named["read"][column], architecture=0x40000003) == 1  # 32-bit calls have other numbers
    assert {verdict(pair[column]) for pair in answer_runner._REFUSED.values() if pair[column] is not None} == {1}
    assert verdict(answer_runner._CLONE3[column]) == errno.ENOSYS
    for numbers, allowed, refused in (
        (answer_runner._CLONE, [(0x3D0F00,)], [(0x1200011,), (0x4111,), (0x10000000,)]),
        (answer_runner._KILL, [(7, 10)], [(1, 0), (8, 9), (0xFFFFFFFF, 0)]),
        (answer_runner._TGKILL, [(7, 7, 10), (7, 9, 10)], [(1, 7, 0)]),
        (answer_runner._PRLIMIT, [(0, 7), (7, 7)], [(1, 7), (8, 7)]),
        (answer_runner._FCNTL, [(3, 1), (3, 3), (3, 1030)], [(3, 8), (3, 10), (3, 15)]),
        (answer_runner._IOCTL, [(3, 0x5401)], [(3, 0x8901), (3, 0x8902)]),
    ):
        assert {verdict(numbers[column], *arguments) for arguments in allowed} == {0}
        assert {verdict(numbers[column], *arguments) for arguments in refused} == {1}


def test_what_is_missing_is_said() -> None:
    assert sandbox.described(answer_runner.PROTECTIONS)[1] == ""
    stopped, open_to_them = sandbox.described((CALLS,))
    assert "no network" in stopped and "read and write your files" in open_to_them and "user namespaces" in open_to_them
    assert "the network" in sandbox.described(())[1]


def main() -> None:
    """Print the table: attack × outcome, with everything that this machine offers, in a container, and without protections."""
    sets = {"all": sandbox.protections(), "container": offered_of(CONTAINER), "limits alone": ()}
    offers = ", ".join(sandbox.protections()) or "limits alone"
    print(f"{platform.system()} {platform.release()} on {platform.machine()}, which offers {offers}. `python tests/test_sandbox.py`\n")
    print(f"| attack | {' | '.join(sets)} |\n| --- |{' --- |' * len(sets)}")
    with tempfile.TemporaryDirectory() as folder, made_target(Path(folder)) as target:
        for name, attack in ATTACKS.items():
            row = []
            for offered in sets.values():
                tried = attack.harmless or set(attack.stopped_by) & {*offered, LIMITS}
                row.append("not tried" if not tried else "succeeds" if succeeds(attack, target, offered) else "stopped")
            print(f"| {name} | {' | '.join(row)} |")
        for name, code in WORKS.items():
            print(f"| needed: {name} | {'works' if sandbox.asserts_hold(code, []) else 'FAILS'} | | |")
    started = time.monotonic()
    for _ in range(50):
        sandbox.asserts_hold("x = 1", ["assert x == 1"])
    print(f"\n{(time.monotonic() - started) / 50 * 1000:.0f} ms per check, one after the other.")


if __name__ == "__main__":
    main()
