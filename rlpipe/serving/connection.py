"""Requests to one server: many in flight, tried again while their deadline lasts, and failures that say what was wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import Any

from rlpipe.errors import ServerError

log = logging.getLogger("rlpipe")

TRIED_AGAIN = (408, 425, 429, 500, 502, 503, 504)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
CONNECT_S = 10.0  # of one attempt; a machine that is gone does not answer at all
IDLE_S = 4.0  # that a connection is kept for the next request; vLLM's server ends it after 5, and a request may be on its way
EVERY_S = 10.0
CLOSE_S = 5.0  # to take leave of the servers
GRACE_S = 30.0  # past all deadlines, before the thread that keeps them counts as stuck
SHOWN = 300  # characters of an answer in a message


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is: its root, as http://HOST:PORT, and its key, if it wants one."""

    root: str
    key: str = ""

    @classmethod
    def of(cls, url: str, key: str = "") -> Address:
        """The `/v1` that such URLs end with is taken off: some endpoints are beside it."""
        return cls(url.rstrip("/").removesuffix("/v1"), key)

    def host_and_port(self) -> tuple[str, int]:
        """Of an address that says both."""
        host, _, port = self.root.partition("://")[2].rpartition(":")
        return host.strip("[]"), int(port)


class Connection:
    """Thread-safe; not picklable, so each process makes its own.

    address: of the server, or a function that says where it is now and may take its time: it is asked at the first request and
    after each connection that fails, and the time it takes does not count. It raises ServerError if there is no server any
    more. what: the server's name in messages. at_once: requests in flight; others wait for their turn within their deadline.
    """

    def __init__(self, address: Address | Callable[[], Address], what: str, at_once: int = 64):
        self._find = address if callable(address) else None
        self._address = None if callable(address) else address
        self.what, self.at_once = what, at_once
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: Any = None
        self._end: weakref.finalize | None = None
        self._search: asyncio.Future | None = None
        self._random = random.Random()  # of the pauses only: clients that failed together do not come back together

    def ask(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        """The parsed answer to one request, a POST if it has a body. Raises ServerError."""
        (answer,) = self.ask_all(path, [body], timeout_s)
        if isinstance(answer, ServerError):
            raise answer
        return answer

    def ask_all(self, path: str, bodies: Sequence[Mapping[str, Any] | None], timeout_s: float) -> list[Any]:
        """All at once: for each the parsed answer, or the ServerError it ended with. timeout_s: of all of them together, less
        the time that the server itself was being looked for."""
        if not bodies:
            return []
        answers: list[Any] = [None] * len(bodies)
        future = asyncio.run_coroutine_threadsafe(self._all(path, bodies, timeout_s, answers), self._running())
        self._wait(future, answers, path, timeout_s)
        return answers

    def close(self) -> None:
        """Ends the connections and their thread; a later request opens new ones."""
        with self._lock:
            end, self._end, self._loop = self._end, None, None
        if end is not None:
            end()

    def _wait(self, future: Future, answers: list[Any], path: str, timeout_s: float) -> None:
        started = time.monotonic()
        while True:
            try:
                future.result(EVERY_S)
                return
            except NotYet:
                if future.done():  # it ended in this moment, or in a TimeoutError of its own
                    future.result()
                    return
                waited, done = time.monotonic() - started, sum(answer is not None for answer in answers)
                log.info("waiting for %s, %s: %d/%d (%.0f s of %.0f s)", self.what, path, done, len(answers), waited, timeout_s)
                if self._find is None and waited > timeout_s + GRACE_S:
                    future.cancel()
                    raise ServerError(f"{self.what}: the thread of its connections is stuck ({waited:.0f} s)") from None

    def _running(self) -> asyncio.AbstractEventLoop:
        """The loop that all requests run in, in a thread of its own."""
        with self._lock:
            if self._loop is None:
                self._loop, self._session = asyncio.new_event_loop(), None
                sessions: list[Any] = []
                thread = threading.Thread(
                    target=_run, args=(self._loop, sessions), name=f"connections to {self.what}", daemon=True
                )
                thread.start()
                self._sessions, self._end = sessions, weakref.finalize(self, _end, self._loop, thread)
            return self._loop

    async def _all(self, path: str, bodies: Sequence[Any], timeout_s: float, answers: list[Any]) -> None:
        import aiohttp

        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self.at_once, keepalive_timeout=IDLE_S)
            self._session, self._search = aiohttp.ClientSession(connector=connector), None
            self._sessions.append(self._session)

        async def one(index: int) -> None:
            try:
                answers[index] = await self._persist(path, bodies[index], timeout_s)
            except ServerError as error:
                answers[index] = error

        await asyncio.gather(*(one(index) for index in range(len(bodies))))

    async def _persist(self, path: str, body: Any, timeout_s: float) -> Any:
        """Attempts until one succeeds, is refused, or the deadline has passed."""
        deadline, attempts, pause, last = time.monotonic() + timeout_s, 0, FIRST_PAUSE_S, "the deadline passed at once"
        deadline += await self._locate(None)
        while (left := deadline - time.monotonic()) > 0:
            attempts += 1
            used = self._address
            try:
                return await self._attempt(used, path, body, left)
            except _Failed as error:
                last, longest = str(error), error.pause_s
                if error.lost:
                    deadline += await self._locate(used)
            pause_s = max(longest, pause * self._random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_S)
            await asyncio.sleep(max(0.0, min(pause_s, deadline - time.monotonic())))
        raise ServerError(
            f"{self.what} ({self._address.root}{path}) gave no answer in {timeout_s:g} s, {attempts} attempt(s); last: {last}. "
            "See the server's log, allow more seconds, or let fewer requests be in flight"
        )

    async def _locate(self, lost: Address | None) -> float:
        """Learn where the server is now, unless another request has learnt it meanwhile. Returns the seconds it took."""
        if self._find is None or self._address is not lost:
            return 0.0
        started = time.monotonic()
        if self._search is None or self._search.done():  # requests that miss the server together look for it once
            self._search = asyncio.ensure_future(asyncio.to_thread(self._find))
        found = await asyncio.shield(self._search)
        if self._address != found:
            log.info("%s is at %s", self.what, found.root)
        self._address = found
        return time.monotonic() - started

    async def _attempt(self, address: Address, path: str, body: Any, left: float) -> Any:
        import aiohttp

        headers = {"Authorization": f"Bearer {address.key}"} if address.key else {}
        limit = aiohttp.ClientTimeout(total=left, sock_connect=min(CONNECT_S, left))
        method = "GET" if body is None else "POST"
        try:
            async with self._session.request(
                method, address.root + path, json=body, headers=headers, timeout=limit, allow_redirects=False
            ) as answer:
                text = (await answer.read()).decode("utf8", "replace")
                status, after = answer.status, answer.headers.get("Retry-After", "")
        except TimeoutError:
            raise _Failed(f"no whole answer after {left:.3g} s") from None
        except aiohttp.InvalidURL:
            raise ServerError(f"{self.what}: {address.root + path} is no URL") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Failed(f"{type(error).__name__}: {error}", lost=True) from None
        if status in TRIED_AGAIN:
            raise _Failed(f"status {status}: {_shown(text)}", pause_s=float(after) if after.isdecimal() else 0.0)
        if status >= 300:
            raise ServerError(f"{self.what} ({address.root}{path}) refused the request, status {status}: {_shown(text)}")
        try:
            return json.loads(text)
        except ValueError:
            raise _Failed(f"the answer is no JSON: {_shown(text)}") from None


class _Failed(Exception):
    """One attempt failed and may be repeated: after so many seconds, and perhaps elsewhere, if the server was lost."""

    def __init__(self, reason: str, pause_s: float = 0.0, lost: bool = False):
        super().__init__(reason)
        self.pause_s, self.lost = pause_s, lost


def _run(loop: asyncio.AbstractEventLoop, sessions: list[Any]) -> None:
    """The thread of one connection; it closes what was opened in it."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        for session in sessions:
            loop.run_until_complete(session.close())
    finally:
        loop.close()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Also when a connection is forgotten, and at the end of the process."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)
    if threading.current_thread() is not thread:
        thread.join(CLOSE_S)


def _shown(text: str) -> str:
    return repr(text[:SHOWN]) + "…" * (len(text) > SHOWN)
