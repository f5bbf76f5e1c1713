"""What a server once answered, kept in memory and on disk: the same question is asked once, by any process of a machine."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import socket
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("rlpipe")

IN_MEMORY = 20_000  # answers, some 2 KB each; the oldest make room
BUSY_S = 30.0  # that another process may hold the file
AT_A_TIME = 500  # keys of one query


def key_of(*parts: Any) -> str:
    """A digest of anything that JSON can say: of everything that the answer depends on."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """Thread-safe. folder: where the file is, one for each machine, so that processes of a machine share it and a network
    file system is no danger; empty: memory only. hits, misses: of all lookups.

    It is a help and no more: a file that cannot be read or written is reported once, and the answers stay in memory.
    """

    def __init__(self, folder: str = ""):
        self.hits = self.misses = 0
        self._memory: dict[str, str] = {}
        self._lock = threading.Lock()
        self._file: sqlite3.Connection | None = None
        if folder:
            with self._harmless():
                Path(folder).mkdir(parents=True, exist_ok=True)
                path = Path(folder) / f"answers-{socket.gethostname()}.sqlite"
                self._file = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
                self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT) WITHOUT ROWID")

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """Those of the keys that are known, with their answers."""
        wanted = list(dict.fromkeys(keys))
        with self._lock:
            found = {key: self._memory[key] for key in wanted if key in self._memory}
            missing = [key for key in wanted if key not in found]
            for start in range(0, len(missing), AT_A_TIME):
                found |= self._read(missing[start : start + AT_A_TIME])
            self.hits += len(found)
            self.misses += len(wanted) - len(found)
            self._remember(found)
        return found

    def put(self, answers: Mapping[str, str]) -> None:
        with self._lock:
            self._remember(answers)
            with self._harmless():
                if self._file is not None and answers:
                    self._file.execute("BEGIN IMMEDIATE")
                    self._file.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", answers.items())
                    self._file.execute("COMMIT")

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _read(self, keys: list[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        with self._harmless():
            if self._file is not None:
                marks = ", ".join("?" * len(keys))
                found = dict(self._file.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", keys))
        return found

    def _remember(self, answers: Mapping[str, str]) -> None:
        self._memory |= answers
        for key in list(itertools.islice(self._memory, max(0, len(self._memory) - IN_MEMORY))):
            del self._memory[key]

    @contextlib.contextmanager
    def _harmless(self):
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            log.warning("answers of servers are kept in memory only: their file is unusable (%s)", error)
            file, self._file = self._file, None
            if file is not None:
                file.close()
