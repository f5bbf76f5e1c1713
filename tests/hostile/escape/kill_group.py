"""Kills its process group and session."""
# ruff: noqa

import os, signal


def attack():
    os.kill(0, signal.SIGKILL)
    os.killpg(os.getpgrp(), signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)
