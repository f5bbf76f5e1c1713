"""All checkpoints of one run: written while training goes on, kept whole, found again."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlpipe.checkpoint import folders, manifest, remote
from rlpipe.checkpoint.fitting import EXPORT, PLAIN, UNIVERSAL, said, way_to_load
from rlpipe.checkpoint.folders import STATE
from rlpipe.checkpoint.manifest import Part
from rlpipe.config import CheckpointConfig
from rlpipe.errors import CheckpointError, WaitTimeout

log = logging.getLogger("rlpipe")

FAILURES = 3  # writes that may fail in a row; the run ends with the last of them
# Of the run's folder: the first always, all of them where that folder may be lost.
CARRIED = ("config.yaml", "metrics.jsonl", "prompts.jsonl", "pass_rates.jsonl", "incidents.jsonl")


class Group(Protocol):
    """All ranks of one model that learns."""

    role: str

    def shape(self) -> dict[str, int]:
        """{"workers", "zero_stage"}: what the files of its ranks depend on."""

    def sees(self, folder: str) -> list[tuple[str, str, bool]]:
        """(rank, node, whether that rank sees the folder), of every rank."""

    def snapshot(self, folder: str) -> None:
        """Copy the state; from then on it may change. Writes it to `folder`, now or while other calls run."""

    def written(self, folder: str) -> list[Part]:
        """Wait until the last snapshot is in `folder`, on the disk. Raises CheckpointError if it cannot be, or was another."""

    def convert(self, folder: str) -> None:
        """Make the universal checkpoint beside the ranks' files. Raises CheckpointError."""

    def load(self, folder: str, how: str = PLAIN) -> None:
        """how: plain | universal | export, see `fitting.way_to_load`."""


class Checkpoints:
    """cfg: every, keep, path, background. run_dir: …/RECIPE/RUN; with a path the checkpoints are under path/RECIPE/RUN, and a
    run is known there by these two names.

    A path that is a folder holds the checkpoints themselves, and `run_dir/checkpoints` is a link to them. At a URL are copies
    of those in `run_dir/checkpoints`.

    warn, note: take what has to be said (the logger, if not given). completed: called with each folder once it is complete, in
    the writing thread. timeout_s: deadline of waiting for a write.

    Not thread-safe: one thread, the driver's, calls it.
    """

    def __init__(
        self,
        cfg: CheckpointConfig,
        run_dir: Path,
        *,
        warn: Callable[[str], None] = log.warning,
        note: Callable[[str], None] = log.info,
        completed: Callable[[Path], None] | None = None,
        timeout_s: float = 1800.0,
    ):
        self.cfg, self.run_dir, self.timeout_s = cfg, Path(run_dir).resolve(), timeout_s
        self.warn, self.note, self.completed = warn, note, completed
        place = place_of(cfg.path, self.run_dir) if cfg.path else ""
        self.remote = remote.Remote(place) if remote.is_url(place) else None
        self.link = self.run_dir / folders.HOME
        self.home = Path(place) if place and self.remote is None else self.link
        self.waited_s = 0.0  # how long the loop stood still for the writes since the last `metrics`
        self.failures = 0  # in a row
        self._under_way: _Write | None = None
        self._last: Exception | None = None  # why the newest write failed; None if it did not
        self._saved: int | None = None  # step of the newest write, if that was this object's and the run has not gone back
        self._whole: Path | None = None  # what `newest` has just read, so that `restore` need not do it again
        self._here = False  # the newest checkpoint is known to be in `home`: this object wrote it, or loaded it from there

    def metrics(self) -> dict[str, float]:
        """perf/checkpoint_s: seconds that the loop waited for checkpoints since the last call; empty if there were none."""
        waited, self.waited_s = self.waited_s, 0.0
        return {"perf/checkpoint_s": waited} if waited else {}

    def check(self, groups: Sequence[Group]) -> None:
        """Raises CheckpointError if a rank does not see the folder that all have to write to, or it cannot be made. Worth a
        call before the first step: nobody wants to know after the last."""
        self._make_home()
        for group in groups:
            for rank, node, sees in group.sees(str(self.home.resolve())):
                if not sees:
                    raise CheckpointError(f"{rank} on node {node} does not see {self.home.resolve()}: {manifest.SHARED}")

    def save(self, step: int, state: dict[str, Any], groups: Sequence[Group]) -> None:
        """Write the checkpoint of a finished step; the next save, `finish` and `restore` wait for it. One that was just written
        is left as it is.

        state: JSON, as it is now. groups: the models; their weights and optimizers as they are now. A write that fails is a
        warning, and the earlier ones stay; CheckpointError at the third in a row, or if the folder cannot be shared.
        """
        started = time.perf_counter()
        try:
            self._settle()
            if self._saved == step:
                return
            self.check(groups)
            text = json.dumps({"learner": groups[0].shape()} | state, indent=1, sort_keys=True)
            try:
                partial = folders.begin(self.home.resolve(), step)
                self._carry(partial)
                for group in groups:
                    group.snapshot(str(partial))
            except (CheckpointError, OSError) as error:
                self._failed(step, error)
                return
            write = _Write(step, partial, lambda: self._write(step, text, partial, groups))
            if self.cfg.background:
                self._under_way = write
                write.start()
            else:
                write.run()
                self._account(write)
        finally:
            self.waited_s += time.perf_counter() - started

    def finish(self) -> None:
        """Wait for what is being written. Raises CheckpointError if the newest checkpoint could not be."""
        self._settle()
        if self._last is not None:
            raise CheckpointError(f"the newest checkpoint could not be written: {self._last}") from self._last

    def close(self) -> None:
        """As `finish`, but a failure is a warning: for a run that ends for another reason. Safe after any failure."""
        try:
            self.finish()
        except (CheckpointError, WaitTimeout) as error:
            self.warn(str(error))

    def complete(self) -> list[Path]:
        """Folders of the complete checkpoints, oldest first; those that are only at the URL under the name that they will have
        here. Whether they are damaged is not looked at."""
        known = {step: self.home / folders.name_of(step) for step in self._copied()}
        for home in (self.link, self.home):  # the run may have begun without a path; the same folders for all other runs
            known |= {folders.step_of(folder.name): folder for folder in folders.complete_in(home)}
        return [known[step] for step in sorted(known)]

    def _copied(self) -> list[int]:
        """Steps that are complete at the URL. One that cannot be reached is a warning, where nothing newer could be there."""
        try:
            return self.remote.complete() if self.remote else []
        except CheckpointError as error:
            if not self._here:
                raise
            self.warn(f"{error}; what is in {self.home} has to do")
            return []

    def newest(self) -> Path | None:
        """The newest complete checkpoint that is not damaged, fetched if it is only at the URL; None without one. Every file is
        read, and what is damaged is a warning. What is being written is waited for."""
        self._give_up()
        self._whole = None
        self._whole = self._undamaged(self.complete())
        return self._whole

    def restore(self, groups: Sequence[Group], location: Path) -> dict[str, Any]:
        """Load a checkpoint into the ranks, or the one before if it is damaged (a warning says so); returns the driver's state,
        whose `step` says which it was. What is being written is waited for first, or given up if its ranks are gone.

        Ranks of another number or ZeRO stage load it too, see `fitting.way_to_load`; that is said. Raises CheckpointError if no
        checkpoint is left or the ranks cannot load it.
        """
        self._give_up()
        self._saved = self._last = None
        step = folders.step_of(Path(location).name)
        before = [folder for folder in self.complete() if folders.step_of(folder.name) <= step]
        folder, self._whole = self._undamaged(before), None
        if folder is None:
            raise CheckpointError(f"{location} is damaged or gone, and there is none before it; start anew with resume=never")
        folder = folder.resolve()
        state = folders.read_state(folder)
        for group in groups:
            for rank, node, sees in group.sees(str(folder)):
                if not sees:
                    raise CheckpointError(f"{rank} on node {node} does not see {folder}: {manifest.SHARED}")
        how = self._prepare(groups, folder, state)
        for group in groups:
            group.load(str(folder), how)
        self._here = True
        return state

    def _prepare(self, groups: Sequence[Group], folder: Path, state: dict[str, Any]) -> str:
        saved, now = state["learner"], groups[0].shape()
        how = way_to_load(saved, now)
        if how == UNIVERSAL:
            try:
                for group in groups:
                    group.convert(str(folder))
                self.note(f"{folder.name} of {said(saved)} is read by {said(now)}, as a universal checkpoint")
            except CheckpointError as error:
                self.warn(f"{folder.name} could not be made a universal checkpoint: {error}")
                how = EXPORT
        if how == EXPORT:
            self.warn(f"of {folder.name} of {said(saved)}, {said(now)} read only the exported weights: the optimizer is fresh")
        return how

    def _undamaged(self, saved: list[Path]) -> Path | None:
        """The last one that is. Raises CheckpointError if there are some and all are damaged."""
        damaged: list[str] = []
        for folder in reversed(saved):
            wrong = "" if folder == self._whole else self._wrong_with(folder)
            if not wrong:
                if damaged:
                    self.warn(f"using {folder.name} instead")
                return folder
            damaged.append(wrong)
            self.warn(f"checkpoint {folder.name} is damaged: {wrong}")
        if damaged:
            raise CheckpointError(
                f"all {len(damaged)} checkpoints of {self.run_dir} are damaged, the newest one: {damaged[0]}. Start anew with "
                "resume=never"
            )
        return None

    def _wrong_with(self, folder: Path) -> str:
        """Why a checkpoint cannot be used; empty if it can, and is here."""
        wrong = ""
        if (folder / STATE).is_file():
            wrong = manifest.damage(folder)
            if not wrong:
                return ""
        step = folders.step_of(folder.name)
        if self.remote is None or step not in self._copied():
            return wrong or f"{folder} is gone"
        self.note(f"fetching {folder.name} from {self.remote.url}")
        self._make_home()
        folders.sweep(self.home.resolve())
        try:
            self.remote.download(step, self.home.resolve())
        except CheckpointError as error:
            return str(error)
        return ""

    def _write(self, step: int, text: str, partial: Path, groups: Sequence[Group]) -> None:
        """In the writing thread: what is left to do once the copies are made."""
        parts = [part for group in groups for part in group.written(str(partial))]
        (partial / STATE).write_text(text, encoding="utf8")
        manifest.write(partial, manifest.gather(partial, parts), step)
        folder = folders.commit(partial)
        folders.rotate(folder.parent, step, self.cfg.keep)
        log.info("checkpoint of step %d in %s", step, folder)
        if self.completed is not None:
            self.completed(folder)
        if self.remote is not None:
            self.remote.upload(folder)
            self.remote.rotate(step, self.cfg.keep)
            log.info("checkpoint of step %d copied to %s", step, self.remote.url)

    def _carry(self, partial: Path) -> None:
        """What a run needs of its folder to go on, for a run that finds the checkpoint and nothing else."""
        for name in CARRIED if self.cfg.path else CARRIED[:1]:
            if (self.run_dir / name).is_file():
                shutil.copyfile(self.run_dir / name, partial / name)

    def _make_home(self) -> None:
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            if self.home != self.link and not self.link.exists():
                self.link.parent.mkdir(parents=True, exist_ok=True)
                self.link.unlink(missing_ok=True)  # it led to a place that is gone
                self.link.symlink_to(self.home, target_is_directory=True)
        except OSError as error:
            raise CheckpointError(f"{self.home} cannot be made: {error}. Give another checkpoint.path or output_dir") from error

    def _settle(self) -> None:
        """Wait for the write under way, and account for how it went."""
        write, self._under_way = self._under_way, None
        if write is not None:
            write.wait(self.timeout_s)
            self._account(write)

    def _give_up(self) -> None:
        """As `_settle`, but a failure is not counted: the ranks whose state it was are gone."""
        write, self._under_way = self._under_way, None
        if write is not None:
            write.wait(self.timeout_s)
            if write.error is None:
                self._account(write)
            else:
                shutil.rmtree(write.partial, ignore_errors=True)
                self.warn(f"the checkpoint of step {write.step} that was being written is lost: {write.error}")

    def _account(self, write: _Write) -> None:
        if write.error is None:
            self.failures, self._last, self._saved, self._here = 0, None, write.step, True
        else:
            shutil.rmtree(write.partial, ignore_errors=True)
            self._failed(write.step, write.error)

    def _failed(self, step: int, error: Exception) -> None:
        folders.sweep(self.home.resolve())
        self.failures, self._last = self.failures + 1, error
        message = f"the checkpoint of step {step} could not be written: {error}"
        if self.failures >= FAILURES:
            raise CheckpointError(
                f"{message}. That makes {self.failures} in a row. Free some space and run the same command with resume=auto; "
                "the last complete checkpoint is untouched"
            ) from error
        self.warn(f"{message}. The run goes on, and the earlier ones are untouched")


class _Write:
    """One write, in a thread of its own or at once. error: why it failed, once it is over."""

    def __init__(self, step: int, partial: Path, work: Callable[[], None]):
        self.step, self.partial, self.work = step, partial, work
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self.run, name=f"checkpoint of step {step}", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def run(self) -> None:
        try:
            self.work()
        except Exception as error:
            self.error = error

    def wait(self, timeout_s: float, every_s: float = 10.0) -> None:
        started = time.monotonic()
        while self.thread.is_alive():
            waited = time.monotonic() - started
            if waited >= timeout_s:
                raise WaitTimeout(f"{self.thread.name} is not written after {timeout_s:.0f} s; is its file system still there?")
            self.thread.join(min(every_s, timeout_s - waited))
            if self.thread.is_alive():
                log.info("waiting for the %s to be written (%.0f s of %.0f s)", self.thread.name, waited, timeout_s)


def place_of(path: str, run_dir: Path) -> str:
    """Where under checkpoint.path the checkpoints of a run are."""
    run_dir = Path(run_dir).resolve()  # `latest` is a link
    under = f"{run_dir.parent.name}/{run_dir.name}"
    return f"{path.rstrip('/')}/{under}" if remote.is_url(path) else str(Path(path).expanduser().absolute() / under)


def find_run(path: str, recipe: str, wanted: Callable[[str], bool] = lambda name: True) -> str | None:
    """The run of a recipe whose newest checkpoint under `path` was made last, by its name; None if there is none. wanted: of
    names that count. For a node that has never seen the run's folder."""
    times: dict[str, float] = {}
    if remote.is_url(path):
        url = f"{path.rstrip('/')}/{recipe}"
        for name in filter(wanted, remote.runs_under(url)):
            place = remote.Remote(f"{url}/{name}")
            steps = place.complete()
            if steps:
                times[name] = max(map(place.written, steps))
    else:
        for home in (Path(path).expanduser() / recipe).glob("*"):
            saved = folders.complete_in(home) if wanted(home.name) else []
            if saved:
                times[home.name] = max(map(_written, saved))
    return max(times, key=times.get) if times else None


def _written(folder: Path) -> float:
    """When a checkpoint was made, in seconds since 1970; 0 if its run has removed it meanwhile."""
    try:
        return (folder / STATE).stat().st_mtime
    except OSError:
        return 0.0


def unpack(folder: Path, run_dir: Path) -> None:
    """Put the run's own files that a checkpoint carries where they were, if they are gone."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in CARRIED:
        if (folder / name).is_file() and not (run_dir / name).exists():
            shutil.copyfile(folder / name, run_dir / name)
