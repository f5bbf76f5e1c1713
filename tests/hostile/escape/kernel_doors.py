"""Calls with a history: io_uring, bpf, keys, userfaultfd, perf and their like."""
# ruff: noqa

import ctypes


def attack():
    libc = ctypes.CDLL(None, use_errno=True)
    block = ctypes.create_string_buffer(512)
    doors = {
        "io_uring_setup": (425, 8, block),
        "bpf": (321, 0, block, 120),
        "keyctl": (250, 0, -3, 1),
        "add_key": (248, b"user", b"k", b"v", 1, -3),
        "request_key": (249, b"user", b"k", 0, 0),
        "userfaultfd": (323, 1),
        "perf_event_open": (298, block, 0, -1, -1, 0),
        "kexec_load": (246, 0, 0, 0, 0),
        "init_module": (175, block, 10, b""),
        "finit_module": (313, 0, b"", 0),
        "iopl": (172, 3),
        "ioperm": (173, 0, 10, 1),
        "swapon": (167, b"/x", 0),
        "quotactl": (179, 0, 0, 0, 0),
        "acct": (163, b"/tmp/a"),
        "modify_ldt": (154, 1, block, 16),
        "fanotify_init": (300, 0, 0),
        "inotify_init": (253,),
        "shmget": (29, 0, 4096, 0o1600),
        "msgget": (68, 0, 0o1600),
        "semget": (64, 0, 1, 0o1600),
        "mq_open": (240, b"q", 66, 0o600, 0),
        "memfd_create": (319, b"m", 0),
        "secretmem": (447, 0),
        "personality": (135, 0x0400000),
        "syslog": (103, 3, block, 100),
        "vhangup": (153,),
        "pkey_alloc": (330, 0, 0),
        "name_to_handle_at": (303, -100, b"/", block, block, 0),
        "move_pages": (279, 0, 0, 0, 0, 0, 0),
        "mbind": (237, 0, 0, 0, 0, 0, 0),
        "timer_create": (222, 1, 0, block),
        "kcmp": (312, 1, 1, 0, 0, 0),
        "seccomp": (317, 1, 0, block),
    }
    opened = [name for name, call in doors.items() if libc.syscall(*call) >= 0]
    return FACTS["won"] if opened else "no"
