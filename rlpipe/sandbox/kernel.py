"""The Linux calls that Python has no name for. Each raises OSError with the kernel's reason."""

from __future__ import annotations

import ctypes
import os
import platform

libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80
CLONE_VM, CLONE_THREAD = 0x100, 0x10000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP = 1, 4, 22, 38, 24
LAST_CAPABILITY = 63  # the kernel refuses the numbers that it does not have
AT_RECURSIVE, AT_EMPTY_PATH = 0x8000, 0x1000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
NUMBERS = {  # of the calls that glibc does not wrap: x86_64, aarch64
    "pivot_root": (155, 41),
    "capset": (126, 91),
    "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}
MACHINES = ("x86_64", "aarch64")


def machine() -> str:
    return platform.machine()


def syscall(name: str, *args: object) -> int:
    """Raises OSError; NotImplementedError on a machine whose call numbers are not listed here."""
    if machine() not in MACHINES or not hasattr(libc, "syscall"):
        raise NotImplementedError(f"system calls of {machine()} are not known here")
    result = libc.syscall(NUMBERS[name][MACHINES.index(machine())], *args)
    return _checked(name, result)


def unshare(flags: int) -> None:
    _checked("unshare", libc.unshare(flags))


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    code = libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _checked(f"mount {source} on {target}", code)


def unmount(target: str) -> None:
    _checked(f"umount {target}", libc.umount2(target.encode(), MNT_DETACH))


def seal_mount(target: str) -> None:
    """Read-only, no set-uid programs, no devices, with everything mounted below it."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    syscall("mount_setattr", -100, target.encode(), ctypes.c_uint(AT_RECURSIVE), ctypes.byref(attributes), size)


def pivot_here() -> None:
    """The working directory becomes the root, and the old root is gone."""
    syscall("pivot_root", b".", b".")
    unmount(".")
    os.chdir("/")


def prctl(option: int, *args: int) -> None:
    padded = [ctypes.c_ulong(a) for a in (*args, *[0] * (4 - len(args)))]
    _checked(f"prctl {option}", libc.prctl(option, *padded))


def drop_capabilities() -> None:
    """All of them, for good: from the bounding set too, so that no program can give them back."""
    for capability in range(LAST_CAPABILITY + 1):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # past the last one, or never had the right to drop them
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    syscall("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def die_with_parent() -> None:
    prctl(PR_SET_PDEATHSIG, 9)


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
