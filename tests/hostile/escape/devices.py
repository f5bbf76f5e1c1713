"""Opens the machine's devices and makes new ones."""
# ruff: noqa

import os, stat


def attack():
    for name in (
        "mem",
        "kmem",
        "port",
        "kmsg",
        "tty",
        "tty0",
        "ptmx",
        "sda",
        "vda",
        "loop0",
        "loop-control",
        "fuse",
        "kvm",
        "net/tun",
        "shm/x",
        "nvidia0",
        "input/event0",
        "mapper/control",
    ):
        try:
            os.close(os.open(f"/dev/{name}", os.O_RDWR | os.O_CREAT))
            return FACTS["won"]
        except OSError:
            pass
    os.mknod("dev", stat.S_IFBLK | 0o666, os.makedev(8, 0))
    return FACTS["won"]
