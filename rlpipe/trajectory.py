"""The one record that travels: what was asked, what was sampled, and how.

A `Trajectory` is enough to replay the rollout: token ids (never text), the absolute block grid, the event log with the
denoising step of every commit, the log-probabilities at commit time, the weight version of every block and the frozen
decoder settings. `Trajectories` holds many of them as flat numpy columns, which Ray moves without copying.

Numpy only: importing this module pulls in neither torch nor ray.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlpipe.errors import NoStepMap

COMMIT, REMASK, EDIT, PRESET = 0, 1, 2, 3  # kinds of event
STOP_REASONS = ("eos", "length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question. Example: `Prompt(uid="sudoku/train/0/17", task="sudoku", text="12_4…", answer={"clues": "12_4…"})`.

    `uid` is unique in a run (it names source, pass and index). `answer` is whatever the verifier of `task` needs; it must
    survive JSON. `demonstration` is a reference response for supervised training, if the source has one. `verifier` judges the
    responses; empty: the run's own. `block_size`: it is decoded in blocks of this many tokens, 0 for what the decoder says.
    `context`: turns of a conversation before the text, (role, content) each, until a template has put them into it. `record`
    names what it is one pass over, the same in every pass and run; empty if that is the uid.
    """

    uid: str
    task: str
    text: str
    answer: dict[str, Any] = field(default_factory=dict)
    demonstration: str | None = None
    verifier: str = ""
    block_size: int = 0
    context: tuple[tuple[str, str], ...] = ()
    record: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLog:
    """What happened to the canvas, in order of time; E events, response-relative positions.

    step int32[E] (0-based denoising step) · position int32[E] · token int32[E] (new token; MASK for a remask) ·
    kind int8[E] (COMMIT, REMASK, EDIT; PRESET: put there by a rule, not drawn, at step -1 if before the first) ·
    logp float32[E] under the sampling distribution · logp_t1 float32[E] at temperature 1, unfiltered ·
    confidence float32[E] (probability of the token at temperature 1) · forced bool[E] (no candidate passed
    the selector's test; this one was taken so that the step makes progress).
    """

    step: np.ndarray
    position: np.ndarray
    token: np.ndarray
    kind: np.ndarray
    logp: np.ndarray
    logp_t1: np.ndarray
    confidence: np.ndarray
    forced: np.ndarray

    DTYPES = {  # a class constant, so not annotated: an annotation would make it a field
        "step": np.int32, "position": np.int32, "token": np.int32, "kind": np.int8,
        "logp": np.float32, "logp_t1": np.float32, "confidence": np.float32, "forced": np.bool_,
    }  # fmt: skip

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What the sampler would have answered at S of its denoising steps, in order of time.

    step int32[S]: 0-based; the first is 0 and the last the response's last · tokens int32[S, L]: the token drawn at each
    position that was masked before the step, elsewhere the one that stood there · confidence float32[S, L]: probability of the
    drawn tokens, as in `EventLog`; 0 where none was drawn. Raises ValueError if shapes disagree.
    """

    step: np.ndarray
    tokens: np.ndarray
    confidence: np.ndarray

    DTYPES = {"step": np.int32, "tokens": np.int32, "confidence": np.float32}

    def __post_init__(self) -> None:
        shape = self.tokens.shape
        if len(shape) != 2 or self.confidence.shape != shape or self.step.shape != shape[:1] or not len(self):
            raise ValueError(f"predictions disagree: {shape} tokens, {self.confidence.shape}, {self.step.shape} steps")

    def __len__(self) -> int:
        return len(self.step)

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.DTYPES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One response to one prompt.

    prompt_ids int32[P] · response_ids int32[L]: the canvas after the prompt, whole terminal block included; positions that
    were never committed still hold MASK · valid_len: tokens that count, up to and including the first EOS and at most
    `max_tokens` · block_size: of the absolute grid (position 0 is the first prompt token); 0 means one canvas (full
    attention) · versions int32[blocks touched by the response]: weight version of each block · stop: 'eos' | 'length' ·
    decoder: frozen decoder settings (JSON-able) · exact: the cache was exact, so `logp` can be replayed · predictions: of its
    steps, None unless they were asked for · step_rewards float32[S]: reward of each of these, None until they are scored.
    """

    uid: str
    sample: int
    seed: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    valid_len: int
    block_size: int
    versions: np.ndarray
    stop: str
    events: EventLog
    decoder: dict[str, Any]
    exact: bool = True
    predictions: Predictions | None = None
    step_rewards: np.ndarray | None = None

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_ids)

    @property
    def response_len(self) -> int:
        return len(self.response_ids)

    @property
    def version(self) -> int:
        """The oldest weight version that any token was sampled with."""
        return int(self.versions.min())

    def loss_mask(self) -> np.ndarray:
        """bool[L]: tokens that count (valid, committed, drawn)."""
        mask = np.arange(self.response_len) < self.valid_len
        return mask & (self.step_map() > 0) & ~self.preset()

    def preset(self) -> np.ndarray:
        """bool[L]: tokens that a rule put there (structure priors, the tail behind EOS); they are shown and never scored."""
        mask = np.zeros(self.response_len, bool)
        mask[self.events.position[self.events.kind == PRESET]] = True
        return mask

    def is_monotone(self) -> bool:
        """True if every event is a commit or a preset and no position has two."""
        log = self.events
        kinds = bool(((log.kind == COMMIT) | (log.kind == PRESET)).all())
        return kinds and int(np.bincount(log.position, minlength=1).max()) <= 1

    def step_map(self) -> np.ndarray:
        """int32[L]: 1-based denoising step at which each token was committed; 0 where none ever was, or fixed beforehand.

        Raises NoStepMap if a token was re-masked or edited: then only the event log describes the rollout.
        """
        self._require_monotone()
        steps = np.zeros(self.response_len, np.int32)
        steps[self.events.position] = self.events.step + 1
        return steps

    def at_commit(self, column: str) -> np.ndarray:
        """[L]: one column of the event log laid out by response position (0 where never committed); monotone only."""
        self._require_monotone()
        values = getattr(self.events, column)
        out = np.zeros(self.response_len, values.dtype)
        out[self.events.position] = values
        return out

    def state(self, step: int, mask_id: int) -> np.ndarray:
        """int32[L]: the response canvas just before 0-based denoising step `step`, replayed from the event log."""
        canvas = np.full(self.response_len, mask_id, np.int32)
        log, past = self.events, self.events.step < step
        # events are in order of time and the last assignment wins
        canvas[log.position[past]] = np.where(log.kind[past] == REMASK, mask_id, log.token[past])
        return canvas

    def _require_monotone(self) -> None:
        if not self.is_monotone():
            raise NoStepMap(
                f"trajectory {self.uid}#{self.sample}: tokens were re-masked or edited after their commit, so it has no step "
                "map; use an objective that reads the event log, or a decoder without an editor"
            )


_SCALARS = {"sample": np.int32, "seed": np.int64, "valid_len": np.int32, "block_size": np.int32, "exact": np.bool_}
_RAGGED = {"prompt_ids": np.int32, "response_ids": np.int32, "versions": np.int32}
_OPTIONAL = {"step_rewards": np.float32} | {f"predictions.{name}": dtype for name, dtype in Predictions.DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Trajectories(Sequence):
    """N trajectories as flat columns. Indexing gives a `Trajectory` whose arrays are views.

    columns: scalars `[N]` (sample, seed, valid_len, block_size, exact, stop as index of STOP_REASONS); ragged
    `NAME` with `NAME.offsets` int64[N+1] for prompt_ids, response_ids, versions; event columns `events.NAME` sharing
    `events.offsets`; if any has them, `predictions.NAME` (their grids flattened) and step_rewards, ragged and empty for a row
    without. uids: list of N. decoder: one settings dict for all.
    """

    columns: dict[str, np.ndarray]
    uids: tuple[str, ...]
    decoder: dict[str, Any]

    def __len__(self) -> int:
        return len(self.uids)

    def __getitem__(self, index: int) -> Trajectory:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        c = self.columns
        events = EventLog(**{k: _slice(c, f"events.{k}", "events.offsets", index) for k in EventLog.DTYPES})
        ragged = {k: _slice(c, k, f"{k}.offsets", index) for k in _RAGGED}
        return Trajectory(
            uid=self.uids[index],
            sample=int(c["sample"][index]),
            seed=int(c["seed"][index]),
            valid_len=int(c["valid_len"][index]),
            block_size=int(c["block_size"][index]),
            exact=bool(c["exact"][index]),
            stop=STOP_REASONS[c["stop"][index]],
            events=events,
            decoder=self.decoder,
            predictions=self._predictions(index, len(ragged["response_ids"])),
            step_rewards=self._optional("step_rewards", index),
            **ragged,
        )

    def _optional(self, name: str, index: int) -> np.ndarray | None:
        """A ragged column that may be missing, or empty for this row."""
        if name not in self.columns:
            return None
        values = _slice(self.columns, name, f"{name}.offsets", index)
        return values if len(values) else None

    def _predictions(self, index: int, length: int) -> Predictions | None:
        found = {name: self._optional(f"predictions.{name}", index) for name in Predictions.DTYPES}
        if found["step"] is None:
            return None
        grids = {name: found[name].reshape(len(found["step"]), length) for name in ("tokens", "confidence")}
        return Predictions(step=found["step"], **grids)

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[i] for i in range(len(self)))

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values())

    @classmethod
    def of(cls, trajectories: Iterable[Trajectory]) -> Trajectories:
        """Columns from records. Raises ValueError if their decoder settings differ or there is none."""
        rows = list(trajectories)
        if not rows:
            raise ValueError("no trajectories to store")
        if any(row.decoder is not rows[0].decoder and row.decoder != rows[0].decoder for row in rows):
            raise ValueError("trajectories of one store must share their decoder settings")
        columns = {k: np.array([getattr(row, k) for row in rows], dtype) for k, dtype in _SCALARS.items()}
        columns["stop"] = np.array([STOP_REASONS.index(row.stop) for row in rows], np.int8)
        for k, dtype in _RAGGED.items():
            columns[k], columns[f"{k}.offsets"] = _concat([getattr(row, k) for row in rows], dtype)
        for k, dtype in EventLog.DTYPES.items():
            columns[f"events.{k}"], columns["events.offsets"] = _concat([getattr(r.events, k) for r in rows], dtype)
        for k, dtype in _OPTIONAL.items():
            found = [_optional(row, k) for row in rows]
            if any(len(values) for values in found):
                columns[k], columns[f"{k}.offsets"] = _concat(found, dtype)
        return cls(columns, tuple(row.uid for row in rows), rows[0].decoder)

    def select(self, indices: Sequence[int]) -> Trajectories:
        """The given rows, in that order, as a store of its own (copied: the original can be freed)."""
        return Trajectories.of([self[i] for i in indices])

    @classmethod
    def concat(cls, parts: Sequence[Trajectories]) -> Trajectories:
        return cls.of([row for part in parts for row in part])

    def save(self, path: str | Path) -> None:
        """Write as .npz; `load` gives the same bytes back."""
        meta = np.array(json.dumps({"uids": list(self.uids), "decoder": self.decoder}))
        np.savez_compressed(path, meta=meta, **self.columns)

    @classmethod
    def load(cls, path: str | Path) -> Trajectories:
        with np.load(path, allow_pickle=False) as data:
            meta = json.loads(str(data["meta"]))
            columns = {k: data[k] for k in data.files if k != "meta"}
        return cls(columns, tuple(meta["uids"]), meta["decoder"])


def _slice(columns: dict[str, np.ndarray], name: str, offsets: str, index: int) -> np.ndarray:
    start, end = columns[offsets][index], columns[offsets][index + 1]
    return columns[name][start:end]


def _optional(row: Trajectory, name: str) -> np.ndarray:
    """A field of _OPTIONAL, flat; empty where the row has none."""
    holder, _, field_name = name.rpartition(".")
    owner = getattr(row, holder) if holder else row
    value = None if owner is None else getattr(owner, field_name)
    return np.zeros(0) if value is None else value.ravel()


def _concat(arrays: list[np.ndarray], dtype: type) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    return np.concatenate(arrays).astype(dtype, copy=False), offsets


def replace(trajectory: Trajectory, **changes: Any) -> Trajectory:
    """A copy with some fields changed."""
    return dataclasses.replace(trajectory, **changes)
