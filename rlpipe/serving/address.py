"""Where a server is that was started with the run: its actor knows, wherever Ray has put it, and through every restart."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from rlpipe.cluster import wait
from rlpipe.errors import ClusterError, ServerError
from rlpipe.server_settings import STARTED
from rlpipe.serving.connection import Address

log = logging.getLogger("rlpipe")

ASK_S, EVERY_S, LINE_S = 30.0, 1.0, 10.0


def finder(url: str, what: str, timeout_s: float) -> Callable[[], Address] | None:
    """A function that gives the server's address as soon as it answers requests; None for a URL that says it itself."""
    if not url.startswith(STARTED):
        return None
    return lambda: find(url.removeprefix(STARTED), what, timeout_s)


def find(name: str, what: str, timeout_s: float) -> Address:
    """Waits until the server of the actor `name` answers. Raises ServerError if it cannot be started, its restarts are spent,
    or timeout_s has passed."""
    started = said = time.monotonic()
    last = "it does not answer yet"
    while (waited := time.monotonic() - started) < timeout_s:
        try:
            address = _ask(name, min(ASK_S, timeout_s - waited))
        except ClusterError as error:  # the actor is being restarted
            address, last = None, str(error)
        if address is not None:
            return address
        if time.monotonic() - said >= LINE_S:
            said = time.monotonic()
            log.info("waiting for %s to answer (%.0f s of %.0f s): %s", what, said - started, timeout_s, last)
        time.sleep(EVERY_S)
    raise ServerError(f"{what} (actor {name}) did not answer within {timeout_s:g} s: {last}. See its log in the run's folder")


def _ask(name: str, timeout_s: float) -> Address | None:
    import ray

    try:
        actor: Any = ray.get_actor(name)
    except ValueError:
        raise ServerError(f"the actor {name} is gone: it was restarted as often as allowed, or the run has ended") from None
    (address,) = wait([actor.address.remote()], what=f"the address of {name}", timeout_s=timeout_s)
    return address
