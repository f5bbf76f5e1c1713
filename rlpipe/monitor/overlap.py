"""What a timeline says in numbers: busy shares of workers and roles, and how far rollout and learning overlap."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlpipe.errors import ConfigError
from rlpipe.monitor.spans import Interval, Span, Trace, intersection, length, read_trace, union, working
from rlpipe.monitor.timeline import place

LISTED = 16  # workers of a role with a line each; of more only least, mean and most


@dataclass(frozen=True, slots=True)
class TrackUse:
    """busy: when it worked, disjoint and in order · share: of the window · failed: spans that did not succeed."""

    track: str
    spans: int
    failed: int
    busy: list[Interval]
    share: float


@dataclass(frozen=True, slots=True)
class Use:
    """Of the tracks within a window of `seconds`.

    overlap: share of the learner's working time during which some rollout worker worked, None without either; overlap_mean:
    the same of one worker, on average · steps: training steps in the window · step_s: their mean length · learner_s,
    rollout_s: working time a step, of the learner and of a rollout worker on average · efficiency: step_s over the longer of
    the two, 1 if nothing waits for anything.
    """

    seconds: float
    tracks: list[TrackUse]
    overlap: float | None = None
    overlap_mean: float | None = None
    steps: int = 0
    step_s: float | None = None
    learner_s: float | None = None
    rollout_s: float | None = None

    @property
    def efficiency(self) -> float | None:
        longer = max(self.learner_s or 0.0, self.rollout_s or 0.0)
        return self.step_s / longer if self.step_s and longer else None

    def of_role(self, role: str) -> list[TrackUse]:
        return [use for use in self.tracks if place(use.track)[0] == role]


def use_of(trace: Trace, first: int | None = None, last: int | None = None) -> Use:
    """Of the whole run; of the training steps from `first` to `last`, where those are given."""
    steps = trace.steps(first, last)
    during = union((step.start, step.end) for step in steps)
    window = trace.window() if first is None and last is None else during
    seconds = length(window)
    if not seconds:
        return Use(0.0, [])
    tracks = []
    for track, spans in trace.by_track().items():
        own = [span for span in spans if span.end > window[0][0] and span.start < window[-1][1]]
        busy = working(own, window)
        tracks.append(TrackUse(track, len(own), sum(not span.succeeded for span in own), busy, length(busy) / seconds))
    use = Use(seconds, tracks, steps=len(steps))
    learner = union(interval for one in use.of_role("learner") for interval in one.busy)
    workers = [one.busy for one in use.of_role("rollout")]
    if learner and workers:
        some, each = union(interval for busy in workers for interval in busy), [intersection(learner, busy) for busy in workers]
        mean = sum(length(both) for both in each) / len(each) / length(learner)
        use = replace(use, overlap=length(intersection(learner, some)) / length(learner), overlap_mean=mean)
    if not steps:
        return use

    def per_step(role: str) -> float | None:
        shares = [length(intersection(one.busy, during)) for one in use.of_role(role)]
        return sum(shares) / len(shares) / len(steps) if shares else None

    step_s = length(during) / len(steps)
    return replace(use, step_s=step_s, learner_s=per_step("learner"), rollout_s=per_step("rollout"))


def table(use: Use) -> list[str]:
    """For people."""
    lines = [f"{'track':<22}{'spans':>8}{'failed':>8}{'busy s':>10}{'busy':>7}"]
    for role in dict.fromkeys(place(one.track)[0] for one in use.tracks):
        own = use.of_role(role)
        if len(own) <= LISTED:
            lines += [_row(one.track, one.spans, one.failed, length(one.busy), one.share) for one in own]
        if len(own) > 1:
            spans, failed = sum(one.spans for one in own), sum(one.failed for one in own)
            shares = [one.share for one in own]
            mean = sum(shares) / len(own)
            row = _row(f"{role}, mean of {len(own)}", spans, failed, mean * use.seconds, mean)
            lines.append(f"{row}   {min(shares):.0%} to {max(shares):.0%}")
    if use.overlap is not None:
        each = f"each of them during {use.overlap_mean:.1%} on average"
        lines.append(f"during {use.overlap:.1%} of the learner's working time some rollout worker was busy, {each}")
    if use.steps:
        parts = [f"{use.steps} steps of {use.step_s:.3f} s"]
        parts += [f"the learner worked {use.learner_s:.3f} s of each"] if use.learner_s is not None else []
        parts += [f"a rollout worker {use.rollout_s:.3f} s on average"] if use.rollout_s is not None else []
        lines.append(", ".join(parts) + (f": {use.efficiency:.2f} × the longer" if use.efficiency else ""))
    return lines


def _row(name: str, spans: int, failed: int, busy_s: float, share: float) -> str:
    return f"{name:<22}{spans:>8}{failed or '':>8}{busy_s:>10.2f}{share:>7.1%}"


def main(run_dir: Path, options: Sequence[str]) -> None:
    """Print the table of a run. options: `steps=A-B`, `steps=A-` or `steps=A`. Raises ConfigError for another."""
    first, last = None, None
    for option in options:
        key, _, value = option.partition("=")
        low, dash, high = value.partition("-")
        if key != "steps" or not low.isdecimal() or not (high.isdecimal() or not high):
            raise ConfigError(f"{option!r} is no option of timeline; give steps=20-40, steps=20- or steps=20")
        first = int(low)
        last = int(high) if high else None if dash else first
    trace = read_trace(run_dir)
    use = use_of(trace, first, last)
    damaged = f", {trace.damaged} lines damaged" if trace.damaged else ""
    starts = max(1, len(trace.starts))
    count = f"{starts} start{'s' if starts > 1 else ''}"
    print(f"{run_dir}: {len(trace.spans)} spans in all, of {count}; {use.seconds:.1f} s looked at{damaged}")
    print("\n".join(table(use)))
    for mark in shown(trace, use)[-LISTED:]:
        when = time.strftime("%H:%M:%S", time.localtime(mark.start))
        print(f"{when} {mark.track}: {mark.args.get('text', mark.name)}")


def shown(trace: Trace, use: Use) -> list[Span]:
    """Marks within what `use` is about."""
    busy = [interval for one in use.tracks for interval in one.busy]
    if not busy:
        return []
    begin, end = min(start for start, _ in busy), max(stop for _, stop in busy)
    return [mark for mark in trace.marks if begin <= mark.start <= end]
