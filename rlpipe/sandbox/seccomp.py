"""The system calls a confined program may make: a list of what Python needs to compute, and nothing that makes a process.

A filter is a small program of the kernel's packet-filter machine (seccomp(2)). What is not listed fails with ENOSYS. There is
no fork, no exec, no socket, no signal to anyone else, no tracing, no mounting, no new namespace; threads are allowed.
"""

from __future__ import annotations

import ctypes
import errno

from rlpipe.sandbox import kernel

AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LOAD, AND, JEQ, RET = 0x20, 0x54, 0x15, 0x06  # ld abs word; and k; jump if equal k; return k
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
OWN_PID = -1  # in a table of values: the process's own number

# name: number on x86_64, on aarch64 (-1: not there)
CALLS = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "preadv": (295, 69), "pwritev": (296, 70), "open": (2, -1), "openat": (257, 56), "close": (3, 57),
    "close_range": (436, 436), "stat": (4, -1), "fstat": (5, 80), "lstat": (6, -1), "newfstatat": (262, 79),
    "statx": (332, 291), "statfs": (137, 43),
    "fstatfs": (138, 44), "lseek": (8, 62), "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216),
    "madvise": (28, 233), "msync": (26, 227), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132), "access": (21, -1), "faccessat": (269, 48), "faccessat2": (439, 439), "pipe": (22, -1),
    "pipe2": (293, 59), "select": (23, -1), "pselect6": (270, 72), "poll": (7, -1), "ppoll": (271, 73),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, -1), "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441), "eventfd2": (290, 19), "dup": (32, 23), "dup2": (33, -1), "dup3": (292, 24),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getpid": (39, 172), "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpgid": (121, 155), "getpgrp": (111, -1), "getsid": (124, 156),
    "uname": (63, 160), "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "truncate": (76, 45),
    "ftruncate": (77, 46),
    "fallocate": (285, 47), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "rename": (82, -1), "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, -1), "mkdirat": (258, 34),
    "rmdir": (84, -1), "unlink": (87, -1), "unlinkat": (263, 35), "symlink": (88, -1), "symlinkat": (266, 36),
    "readlink": (89, -1), "readlinkat": (267, 78), "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53),
    "umask": (95, 166), "utimensat": (280, 88), "getrlimit": (97, 163), "getrusage": (98, 165),
    "sysinfo": (99, 179), "times": (100, 153), "gettimeofday": (96, 169), "time": (201, -1), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "setitimer": (38, 103),
    "getitimer": (36, 102), "alarm": (37, -1), "pause": (34, -1), "futex": (202, 98),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100), "set_tid_address": (218, 96), "rseq": (334, 293), "exit": (60, 93), "exit_group": (231, 94),
    "wait4": (61, 260), "waitid": (247, 95), "getrandom": (318, 278), "membarrier": (324, 283), "getcpu": (309, 168),
    "sendto": (44, 206), "recvfrom": (45, 207), "sendmsg": (46, 211), "recvmsg": (47, 212), "shutdown": (48, 210),
    "getsockopt": (55, 209), "setsockopt": (54, 208), "getsockname": (51, 204), "getpeername": (52, 205),
    "copy_file_range": (326, 285), "sendfile": (40, 71), "restart_syscall": (219, 128),
}  # fmt: skip
# name: numbers, then (argument, mask, values) that must all hold. All these arguments are 32 bits wide.
NEW_NAMESPACES = (
    kernel.CLONE_NEWNS | kernel.CLONE_NEWCGROUP | kernel.CLONE_NEWUTS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWTIME
)  # fmt: skip
THREAD = kernel.CLONE_VM | kernel.CLONE_THREAD
WHOLE = 0xFFFFFFFF
SIGNALS = (0, 1, 2, 3, 4, 6, 7, 8, 10, 11, 12, 13, 14, 15, 17)  # to itself; without KILL: that one always comes from outside
RESOURCES = tuple(range(1, 16))  # all limits but that of processor time, whose SIGKILL would look like one from outside
CONDITIONAL = {
    "clone": ((56, 220), ((0, THREAD | NEW_NAMESPACES & ~0xFF, (THREAD,)),)),  # the low byte is the signal at its end
    "kill": ((62, 129), ((0, WHOLE, (OWN_PID,)), (1, WHOLE, SIGNALS))),
    "tkill": ((200, 130), ((0, WHOLE, (OWN_PID,)), (1, WHOLE, SIGNALS))),
    "tgkill": ((234, 131), ((0, WHOLE, (OWN_PID,)), (2, WHOLE, SIGNALS))),
    "prlimit64": ((302, 261), ((0, WHOLE, (0,)), (1, WHOLE, RESOURCES))),
    "setrlimit": ((160, 164), ((0, WHOLE, RESOURCES),)),
    "socketpair": ((53, 199), ((0, WHOLE, (1,)), (1, 0xF, (1,)))),  # connected streams only: asyncio needs one
    "fcntl": ((72, 25), ((1, WHOLE, (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)),)),  # no owner to be signalled, no larger pipes
    "ioctl": ((16, 29), ((1, WHOLE, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),)),
}
WRITING = ("rename", "renameat", "renameat2", "mkdir", "mkdirat", "rmdir", "unlink", "unlinkat", "symlink", "symlinkat",
           "truncate", "chmod", "fchmod", "fchmodat", "utimensat")  # fmt: skip
O_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000  # write-only, read-write, create, truncate, temporary file
READ_ONLY = {"open": ((2, -1), ((1, O_WRITING, (0,)),)), "openat": ((257, 56), ((2, O_WRITING, (0,)),))}

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, k


def program(machine: str, own_pid: int, *, read_only: bool = False) -> list[Instruction]:
    """The filter for a machine type. read_only: no call that changes a file system either, for where no scratch folder is.

    Raises NotImplementedError for a machine that has no table here.
    """
    if machine not in AUDIT:
        raise NotImplementedError(f"system calls of {machine} are not known here")
    column = tuple(AUDIT).index(machine)
    code: list[Instruction] = [(LOAD, 0, 0, 4), (JEQ, 1, 0, AUDIT[machine]), (RET, 0, 0, KILL), (LOAD, 0, 0, 0)]
    conditional = CONDITIONAL | (READ_ONLY if read_only else {})
    refused = set(conditional) | (set(WRITING) if read_only else set())
    for name, numbers in CALLS.items():
        if name not in refused and numbers[column] >= 0:
            code += [(JEQ, 0, 1, numbers[column]), (RET, 0, 0, ALLOW)]
    for numbers, conditions in conditional.values():
        if numbers[column] >= 0:
            checks = _checks(conditions, own_pid)
            code += [(JEQ, 0, len(checks), numbers[column]), *checks]
    return [*code, (RET, 0, 0, FAIL | errno.ENOSYS)]


def _checks(conditions: tuple, own_pid: int) -> list[Instruction]:
    """Allow if every argument, masked, is one of its values; else fail with EPERM."""
    refuse = (RET, 0, 0, FAIL | errno.EPERM)
    code: list[Instruction] = []
    for argument, mask, values in conditions:
        code += [(LOAD, 0, 0, 16 + 8 * argument), (AND, 0, 0, mask)]
        for i, value in enumerate(values):
            code.append((JEQ, len(values) - i, 0, own_pid if value == OWN_PID else value))
        code.append(refuse)
    return [*code, (RET, 0, 0, ALLOW)]


def install(own_pid: int, *, read_only: bool = False) -> None:
    """Filter this thread and all it starts, for good. No new privileges must be set. Raises OSError, NotImplementedError."""
    code = program(kernel.machine(), own_pid, read_only=read_only)
    packed = b"".join(c.to_bytes(2, "little") + bytes((true, false)) + k.to_bytes(4, "little") for c, true, false, k in code)
    instructions = ctypes.create_string_buffer(packed, len(packed))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    filter_ = Program(len(code), ctypes.addressof(instructions))
    kernel.prctl(kernel.PR_SET_SECCOMP, 2, ctypes.addressof(filter_))
