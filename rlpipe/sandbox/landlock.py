"""Landlock: a process gives up, for good, every path that it does not list. Needs no rights, only Linux 5.13."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from rlpipe.sandbox import kernel

ACCESS_FS = (13, 14, 15, 15, 16)  # how many kinds of access versions 1 to 5 can refuse
READ = 1 << 2 | 1 << 3  # read a file, list a folder
WRITE_FILE = 1 << 1
TCP, SCOPES = 0b11, 0b11  # bind and connect; abstract sockets and signals


def version() -> int:
    """Of the kernel's Landlock; 0 without one."""
    try:
        return kernel.syscall("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint(1))
    except (OSError, NotImplementedError):
        return 0


def restrict(readable: Iterable[str], devices: Iterable[str]) -> None:
    """This process may read what is below `readable`, read and write `devices`, and open nothing else; no TCP; from version 6
    no abstract socket and no signal to a process outside. No new privileges must be set. Raises OSError."""
    abi = version()
    handled = (1 << ACCESS_FS[min(max(abi, 1), len(ACCESS_FS)) - 1]) - 1
    attributes = (ctypes.c_uint64 * 3)(handled, TCP if abi >= 4 else 0, SCOPES if abi >= 6 else 0)
    size = 8 * (1 + (abi >= 4) + (abi >= 6))
    ruleset = kernel.syscall("landlock_create_ruleset", ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint(0))
    try:
        for path in readable:
            _allow(ruleset, path, READ if os.path.isdir(path) else READ & ~(1 << 3))
        for path in devices:
            _allow(ruleset, path, 1 << 2 | WRITE_FILE)
        kernel.syscall("landlock_restrict_self", ruleset, ctypes.c_uint(0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = ctypes.create_string_buffer(access.to_bytes(8, "little") + handle.to_bytes(4, "little"), 12)
        kernel.syscall("landlock_add_rule", ruleset, ctypes.c_int(1), rule, ctypes.c_uint(0))
    finally:
        os.close(handle)
