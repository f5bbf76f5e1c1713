"""A command that cannot outlive who started it: run as a script, with nothing of this package.

`python leash.py COMMAND…` runs the command in a process group of its own. The group is killed when standard input closes,
that is when the process that holds its other end has ended, however it ended; when the command ends; and on SIGTERM. The exit
code is the command's.

Two processes hold the leash: the first is only a child to wait for, because who kills a process may kill its children along
with it (Ray does); the second, a stranger to them, does the work.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """In the command, on Linux: should the second process be killed, too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def hold(command: list[str]) -> int:
    """Runs the command; returns its exit code when all of its group has been killed."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent)

    def kill_group(*_: object) -> None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def wait_for_the_end_of_input() -> None:
        while os.read(0, 4096):
            continue
        kill_group()

    signal.signal(signal.SIGTERM, kill_group)
    threading.Thread(target=wait_for_the_end_of_input, daemon=True).start()
    code = process.wait()
    kill_group()  # what the command has started and left behind
    return code if code >= 0 else 128 - code


def main(command: list[str]) -> int:
    holder = os.fork()
    if holder == 0:
        os.setsid()
        os._exit(hold(command))
    signal.signal(signal.SIGTERM, lambda *_: os.kill(holder, signal.SIGTERM))
    return os.waitstatus_to_exitcode(os.waitpid(holder, 0)[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
