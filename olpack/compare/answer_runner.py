"""Runs one answer in a sandbox: a Python process of its own that calls `main` with its job, in marshal's form, on stdin.

It imports nothing of olpack and as little as possible else, because it starts once for every answer.

The process limits itself for good before the answer's code runs, with what the kernel offers (`PROTECTIONS`), and writes READY to stdout then.
It ends with the job's exit code if the code and all statements ran without an exception: an exit of the answer's own is no success.
A job without code tries every protection, and prints those that work, one a line.

    this process ── the first process of a namespace ── the answer: no further process, no socket, no file but those of `readable()`

All three die with olpack (PR_SET_PDEATHSIG), and whatever is in the namespace dies with its first process.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import stat
import struct
import sys

READY = "ready"
PROTECTIONS = ("namespaces", "landlock", "seccomp")
FILE_BYTES = 1 << 20
FOLDER_BYTES = 16 << 20
FILES = 1000
OPEN_FILES = 64

_NEW_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x08000000 | 0x40000000  # user, mount, process, IPC and network: linux/sched.h
_PRIVATE = (1 << 14) | (1 << 18)  # MS_REC | MS_PRIVATE
_NO_DEVICES = 2 | 4 | 8  # MS_NOSUID | MS_NODEV | MS_NOEXEC
_PDEATHSIG, _NO_NEW_PRIVS = 1, 38  # linux/prctl.h
_SIGKILL = 9

# linux/landlock.h: rights on files by version of the interface, of those on everything below a folder that may be read.
_LANDLOCK = (444, 445, 446)  # create_ruleset, add_rule, restrict_self: the same numbers on every architecture
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # from 5 on: 16 bits
_READ, _WRITE = 1 << 2 | 1 << 3, 1 << 1  # READ_FILE and READ_DIR, WRITE_FILE
_ONLY_FILES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # those that a rule on a file may name

# linux/audit.h and the tables of system calls: the number on x86_64, on aarch64; None: the architecture lacks the call.
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_SECCOMP = (317, 277)
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # the network, and what makes sockets without `socket`
    "socket": (41, 198), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # further processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # other processes: their memory, files, signals, priorities
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # memory that outlives the process, or that no limit counts
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # mounts, namespaces, files by handle
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "quotactl": (179, 60), "acct": (163, 89),
    # the kernel's rarer interfaces, and what only an administrator may do
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "fanotify_init": (300, 262), "personality": (135, 92),
    "modify_ldt": (154, None), "iopl": (172, None), "ioperm": (173, None), "vhangup": (153, 58), "syslog": (103, 116), "reboot": (169, 142),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "swapon": (167, 224), "swapoff": (168, 225), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
}  # fmt: skip
_KILL, _TGKILL, _PRLIMIT, _CLONE, _CLONE3, _FCNTL, _IOCTL = (62, 129), (234, 131), (302, 261), (56, 220), (435, 435), (72, 25), (16, 29)
_THREAD = 0x10000  # CLONE_THREAD
_OWNER_COMMANDS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: a file that signals another process
_OWNER_REQUESTS = (0x8901, 0x8902)  # FIOSETOWN, SIOCSPGRP
_NO, _UNKNOWN, _YES = 0x00050000 | 1, 0x00050000 | 38, 0x7FFF0000  # SECCOMP_RET_ERRNO with EPERM or ENOSYS, SECCOMP_RET_ALLOW

_libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None


def call(name: str, *arguments: object) -> int:
    """A function of the C library, or with "syscall" one of the kernel's.

    Raises:
        OSError: it returns a negative number.
    """
    result: int = getattr(_libc, name)(*(ctypes.c_long(value) if isinstance(value, int) else value for value in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def enter_namespaces(folder: str) -> None:
    """Namespaces of users, mounts, processes, IPC and networks for this process's children, and a file system in memory as their folder."""
    user, group = os.getuid(), os.getgid()
    call("unshare", _NEW_NAMESPACES)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123 (pathlib takes a tenth of the process's time)
            file.write(text)
    call("mount", None, b"/", None, _PRIVATE, None)
    call("mount", b"none", os.fsencode(folder), b"tmpfs", _NO_DEVICES, f"size={FOLDER_BYTES},nr_inodes={FILES},mode=700".encode())


def readable() -> list[str]:
    """What an answer may read besides its folder: Python, its packages, and the system's libraries."""
    starts = (sys.prefix, sys.base_prefix, "/usr", "/usr/local", "/")
    libraries = [f"{start}/{name}" for start in starts for name in ("lib", "lib64", "lib32")]
    return [*libraries, "/nix/store", "/usr/share/zoneinfo", "/etc/localtime", "/dev/zero", "/dev/random", "/dev/urandom"]


def restrict_files(folder: str) -> None:
    """Landlock: nothing is read but `readable()` and the folder, nothing is written but the folder; no TCP, no signals out of it."""
    create, add, restrict = _LANDLOCK
    version = call("syscall", create, None, 0, 1)
    rights = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    attributes = struct.pack("=QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    length = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = call("syscall", create, attributes, length, 0)
    for path, allowed in [(folder, rights), (os.devnull, _READ | _WRITE), *((path, _READ) for path in readable())]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not on this machine
        kept = allowed if stat.S_ISDIR(os.fstat(place).st_mode) else allowed & _ONLY_FILES
        call("syscall", add, rules, 1, struct.pack("=Qi", kept, place), 0)
        os.close(place)
    call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    call("syscall", restrict, rules, 0)
    os.close(rules)


def seccomp_filter(machine: str, process: int) -> list[tuple[int, int, int, int]]:
    """The filter of system calls, in classic BPF: (code, jump if true, jump if false, constant) per instruction.

    Args:
        machine: "x86_64" or "aarch64".
        process: the one that may signal itself.
    """
    load, equal, at_least, masked, answer = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF_LD|W|ABS, JMP|JEQ|K, JMP|JGE|K, JMP|JSET|K, RET|K
    architecture, column = _ARCHITECTURES[machine]
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, _NO), (load, 0, 0, 0)]
    if machine == "x86_64":
        steps += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, _NO)]  # the x32 interface has the same calls under other numbers
    for refused in _REFUSED.values():
        if (number := refused[column]) is not None:
            steps += [(equal, 0, 1, number), (answer, 0, 0, _NO)]
    steps += [(equal, 0, 1, _CLONE3[column]), (answer, 0, 0, _UNKNOWN)]  # its flags lie in memory; the C library then uses clone
    steps += [(equal, 0, 4, _CLONE[column]), (load, 0, 0, 16), (masked, 0, 1, _THREAD), (answer, 0, 0, _YES), (answer, 0, 0, _NO)]
    itself: tuple[tuple[tuple[int, int], tuple[int, ...]], ...] = ((_KILL, (process,)), (_TGKILL, (process,)), (_PRLIMIT, (0, process)))
    for numbers, values in itself:
        steps += [(equal, 0, 3 + len(values), numbers[column]), (load, 0, 0, 16)]
        steps += [(equal, len(values) - index, 0, value) for index, value in enumerate(values)]
        steps += [(answer, 0, 0, _NO), (answer, 0, 0, _YES)]
    owners: tuple[tuple[tuple[int, int], tuple[int, ...]], ...] = ((_FCNTL, _OWNER_COMMANDS), (_IOCTL, _OWNER_REQUESTS))
    for numbers, values in owners:
        steps += [(equal, 0, 3 + len(values), numbers[column]), (load, 0, 0, 24)]
        steps += [(equal, len(values) - index, 0, value) for index, value in enumerate(values)]
        steps += [(answer, 0, 0, _YES), (answer, 0, 0, _NO)]
    return [*steps, (answer, 0, 0, _YES)]


def refuse_calls() -> None:
    """No capabilities, and a filter that refuses the system calls which reach beyond this process.

    Raises:
        OSError: the kernel has no such filters, or the architecture is another.
    """
    machine = os.uname().machine
    if machine not in _ARCHITECTURES:
        raise OSError(f"no table of system calls for {machine}")
    call("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))
    call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    steps = seccomp_filter(machine, os.getpid())
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    call("syscall", _SECCOMP[_ARCHITECTURES[machine][1]], 1, 0, struct.pack("@HP", len(steps), ctypes.addressof(program)))


def limit(cpu_s: int, memory_bytes: int, processes: bool) -> None:
    """Limits of this process: processor time, address space, file size, open files; and of the user's processes where `processes`."""
    try:
        import resource
    except ImportError:
        return  # Windows has no such limits; olpack's time limit applies there too
    limits = {"CPU": cpu_s, "AS": memory_bytes, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "CORE": 0} | ({"NPROC": 1} if processes else {})
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def forked(child_of: int) -> bool:
    """Fork; in the child, which dies with its parent, return True. The parent waits, and ends as the child did."""
    if child := os.fork():
        while True:
            done, status = os.wait()  # the first process of a namespace has others' children as well
            if done == child:
                os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)
    die_with(child_of)
    return True


def die_with(parent: int) -> None:
    """End with the parent, and at once where it has ended already."""
    if sys.platform == "linux":
        call("prctl", _PDEATHSIG, _SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def available(folder: str) -> list[str]:
    """The protections that this machine offers: each is tried in a child."""
    found = []
    for name, attempt in zip(PROTECTIONS, (lambda: enter_namespaces(folder), lambda: restrict_files(folder), refuse_calls), strict=True):
        if not (child := os.fork()):
            try:
                attempt()
            except (OSError, AttributeError):
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            found.append(name)
    return found


def main() -> None:
    """Do the job of stdin: see `sandbox`."""
    sys.dont_write_bytecode = True
    job = marshal.loads(sys.stdin.buffer.read())
    folder = job["folder"]
    if "code" not in job:
        print(*(available(folder) if sys.platform == "linux" else ()), sep="\n")
        return
    protections = job["protections"]
    if "namespaces" in protections:
        enter_namespaces(folder)
    die_with(job["parent"])
    if "namespaces" in protections:
        forked(0)  # the parent lies outside of the namespace, where its number is 0
        forked(1)
        os.chdir(folder)  # into the file system that is mounted there
    if "landlock" in protections:
        restrict_files(folder)
    if "seccomp" in protections:
        refuse_calls()
    limit(job["cpu"], job["memory"], "seccomp" not in protections)
    ready, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.close(nothing)
    os.write(ready, READY.encode())
    os.close(ready)
    names = {"__name__": "answer"}
    try:
        exec(compile(job["code"], "answer", "exec"), names)
        for statement in job["asserts"]:
            exec(compile(statement, "task", "exec"), names)
    except BaseException:
        os._exit(1)
    os._exit(job["success"])
