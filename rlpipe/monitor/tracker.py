"""Weights & Biases: the same numbers as metrics.jsonl, or nothing. It never ends a run.

W&B is imported here only, and only if it is switched on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpipe.config import RunConfig
from rlpipe.monitor.files import jsonable
from rlpipe.monitor.metrics import SECTIONS
from rlpipe.monitor.samples import SampleRow

START_TIMEOUT_S, FINISH_TIMEOUT_S = 60.0, 60.0
TABLE_ROWS = 64
TABLE_COLUMNS = ("step", "uid", "prompt", "response", "reward", "advantage", "tokens", "steps", "parts")


class Tracker:
    """One W&B run, continued under `wandb_id` if that is given.

    cfg.monitor.wandb: online | offline | disabled | auto (WANDB_MODE if set, else online with a login, else offline; if
    online fails, offline). Data lies in run_dir, unless WANDB_DIR says otherwise. Waits are told to `note`; any
    failure of W&B is told to `warn` and ends the tracking, not the run: `id` stays what it was, so a later resume
    continues the same W&B run.
    """

    def __init__(
        self,
        cfg: RunConfig,
        run_dir: Path,
        *,
        wandb_id: str | None,
        rows: Sequence[tuple[int, SampleRow]] = (),
        note: Callable[[str], None],
        warn: Callable[[str], None],
    ):
        self.id, self.where, self._mode = wandb_id, "", "disabled"
        self._note, self._warn = note, warn
        self._run: Any = None
        self._wandb: Any = None
        self._rows: deque[tuple[int, SampleRow]] = deque(rows, maxlen=TABLE_ROWS)
        self._variables: list[str] = []
        if cfg.monitor.wandb != "disabled":
            self._start(cfg, run_dir)

    @property
    def active(self) -> bool:
        return self._run is not None

    def log(self, step: int, metrics: Mapping[str, float], lags: Sequence[int] = ()) -> None:
        """Non-finite numbers are passed on: W&B shows them as such. lags: of the groups trained on, for a histogram."""
        if self._run is not None:
            with self._surviving("logging"):
                line: dict[str, Any] = {"step": step} | {key: float(value) for key, value in metrics.items()}
                if lags:
                    counts = [sum(max(0, lag) == value for lag in lags) for value in range(max(0, *lags) + 1)]
                    edges = [value - 0.5 for value in range(len(counts) + 1)]
                    line["rollout/lag"] = self._wandb.Histogram(np_histogram=(counts, edges))
                self._run.log(line)

    def rewind(self, step: int) -> None:
        """Steps after `step` are about to be logged again, under the same numbers of the x-axis.

        W&B keeps both: its own rewind is a preview that needs rising steps. The newer points come later in its history, so
        its summary is right, and `cluster/rollbacks` tells the lines apart. Of the samples only those up to `step` stay.
        """
        self._rows = deque(((at, row) for at, row in self._rows if at <= step), maxlen=TABLE_ROWS)

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """The newest TABLE_ROWS responses as a fresh table, since a logged one cannot grow."""
        self._rows.extend((step, row) for row in rows)
        if self._run is not None:
            with self._surviving("logging samples"):
                data = [self._cells(at, row) for at, row in self._rows]
                self._run.log({"step": step, "samples": self._wandb.Table(columns=list(TABLE_COLUMNS), data=data)})

    def finish(self, summary: Mapping[str, Any], *, succeeded: bool) -> None:
        """Upload what is left, for at most FINISH_TIMEOUT_S; what is not uploaded by then stays on the disk."""
        if self._run is not None:
            if self._mode == "online":
                self._note(f"waiting for W&B to take the last data, at most {FINISH_TIMEOUT_S:.0f} s")
            with self._surviving("finishing"):
                self._run.summary.update(jsonable(dict(summary)))
                self._run.finish(exit_code=0 if succeeded else 1)
                # `finish` may return before its service wrote the last block, and `run` leaves by os._exit, past W&B's own hook
                self._wandb.teardown()
            self._run = None
        for variable in self._variables:
            os.environ.pop(variable, None)
        self._variables = []

    def _start(self, cfg: RunConfig, run_dir: Path) -> None:
        with self._surviving("starting"):
            import wandb

            self._wandb = wandb
            self._place_files(run_dir)
            wandb.setup(settings=wandb.Settings(silent=True, console="off"))
            modes = self._modes(cfg.monitor.wandb)
            if modes == ["disabled"]:
                return
            for mode in modes:
                try:
                    self._run, self._mode = self._init(mode, cfg, run_dir), mode
                    break
                except Exception as error:  # the last mode's failure is for `_surviving`
                    if mode == modes[-1]:
                        raise
                    self._warn(f"W&B cannot be reached ({error}); recording offline instead")
            self._describe()

    def _init(self, mode: str, cfg: RunConfig, run_dir: Path) -> Any:
        wandb = self._wandb
        if mode == "online":
            self._note(f"opening the W&B run, at most {START_TIMEOUT_S:.0f} s")
        return wandb.init(
            project=cfg.monitor.project,
            name=f"{cfg.name}/{run_dir.name}",
            group=cfg.name,
            dir=os.environ.get("WANDB_DIR") or str(run_dir),
            id=self.id,
            resume="allow",
            mode=mode,
            config=dataclasses.asdict(cfg),
            settings=wandb.Settings(
                silent=True,
                console="off",  # W&B would wrap standard output, and the console draws on it
                reinit="create_new",  # never another run of this process
                init_timeout=START_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
            ),
        )

    def _describe(self) -> None:
        """The x-axis of every section, and where to look."""
        self._run.define_metric("step", hidden=True)
        for section in (*(f"{name}/*" for name in SECTIONS), "samples"):
            self._run.define_metric(section, step_metric="step")
        self.id = self._run.id
        folder = Path(self._run.dir).parent
        self.where = self._run.url if self._mode == "online" else f"wandb sync {folder}"

    def _modes(self, wanted: str) -> list[str]:
        """Modes to try, in order."""
        if wanted != "auto":
            return [wanted]
        if os.environ.get("WANDB_MODE"):
            return [os.environ["WANDB_MODE"]]
        try:  # verify=False: a key that the server refuses, or no network, shows when the run is opened
            return ["online", "offline"] if self._wandb.login(prompt=False, verify=False) else ["offline"]
        except Exception as error:  # said, and offline needs no login
            self._warn(f"the W&B login cannot be used ({error}); recording offline instead")
            return ["offline"]

    def _place_files(self, run_dir: Path) -> None:
        """Staging and cache in the run folder, not in the home folder, which may be read-only; undone by `finish`."""
        for variable, folder in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache")):
            if variable not in os.environ:
                os.environ[variable] = str((run_dir / "wandb" / folder).resolve())
                self._variables.append(variable)

    @contextlib.contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a foreign service raises costs its curves, not the run; it is said, once
            self._run = None
            self._warn(
                f"W&B failed while {what}: {type(error).__name__}: {error}. The run goes on without it; "
                "metrics.jsonl has the same numbers, and monitor.wandb=disabled avoids this line"
            )

    def _cells(self, step: int, row: SampleRow) -> list[Any]:
        parts = json.dumps(jsonable(row.parts), sort_keys=True)
        numbers = [float(row.reward), float(row.advantage), row.tokens, row.steps]
        return [step, row.uid, row.prompt, row.response, *numbers, parts]
