"""The actor around the engine: holds one copy of the model, samples units of work, takes weight updates in place."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlpipe.config import DecoderConfig, ModelConfig, ServerConfig
from rlpipe.errors import RolloutFailed, WeightMismatch
from rlpipe.models.loading import load_tokenizer, settings_of
from rlpipe.models.spreading import load_to_sample
from rlpipe.models.weights import Layout
from rlpipe.rollout.sleep import sleep, wake
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.engine import Engine, EngineCounters, Session
from rlpipe.sampling.guidance import check_tokenizer
from rlpipe.sampling.noise import sample_seed
from rlpipe.sampling.request import Request
from rlpipe.serving.client import Client
from rlpipe.trajectory import Prompt, Trajectories, Trajectory
from rlpipe.transport.update import Facts, Receiver, WeightUpdate
from rlpipe.usage import usage

log = logging.getLogger("rlpipe")

GONE = -1  # no token has this id
GUIDE_S = 60.0  # for the guide to show how it reads text


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One unit of work: `samples` responses to each prompt, sampled together. version: of the weights that it must be done
    with, or newer ones. seed: the run's; each response's own noise seed follows from it, the prompt's uid and the sample's
    index, so a repeated request gives the same responses. predictions: the full prediction is recorded every so many denoising
    steps, 0: never. unit: its name, for `abort`."""

    prompts: tuple[Prompt, ...]
    samples: int
    decoder: DecoderConfig
    version: int
    seed: int
    predictions: int = 0
    unit: str = ""


@dataclass(frozen=True, slots=True)
class RolloutPart:
    """All samples of one prompt, in order. place: of the prompt in the request · texts: decoded up to the first EOS, without
    it · counters: work since the part before · step_texts: of each response the different texts of its predictions ·
    step_index: of each response int32[S], which of them each prediction reads; both empty without predictions.

    Predictions travel to the driver with their trajectories: 8 bytes a token and recorded step, so 4 KB a step of 512 tokens,
    0.5 MB for 128 steps, 64 MB for 128 such responses: little beside the weights that go the other way. Parts belong to the
    driver, so they outlive the worker; references to what a worker keeps would die with it. A stride divides all of this.
    """

    place: int
    trajectories: Trajectories
    texts: tuple[str, ...]
    counters: EngineCounters
    step_texts: tuple[tuple[str, ...], ...] = ()
    step_index: tuple[np.ndarray, ...] = ()


class RolloutWorker:
    """Waits for: nothing. Consumes: requests one at a time, weight updates at any time. Produces: trajectories as they come.

    `generate` runs in the actor's own thread; all other calls may come beside it, from other threads.
    """

    def __init__(
        self,
        index: int,
        model_folder: str,
        model: ModelConfig,
        threads: int,
        slots: int = 0,
        guide: ServerConfig | None = None,
    ):
        torch.set_num_threads(threads)
        self.index, self.slots = index, slots
        policy = load_to_sample(model_folder, model.dtype, **settings_of(model))
        self.tokenizer = load_tokenizer(model_folder)
        self.engine = Engine(policy, _guide(guide, self.tokenizer))
        self.weights = Receiver()
        self.version = -1  # nothing is sampled before the first weight update
        self.lock = threading.Lock()  # of what follows: whose turn it is to touch the model
        self.session: Session | None = None
        self.aborted: set[str] = set()
        self.offer: _Offer | None = None

    def pid(self) -> int:
        return os.getpid()

    def usage(self) -> dict[str, Any]:
        return usage()

    def load_weights(self, update: WeightUpdate) -> tuple[int, str]:
        """Take a weight update; returns (version, checksum) for the driver to compare. In the middle of a unit it is taken
        between two blocks, see `Session.update`; one that is here already, by another way, disturbs nothing. Raises
        WeightMismatch for an update that is damaged or of another model."""
        with self.lock:
            wanted = (update.version, update.checksum)
            if update.checksum and self.version == update.version and (self.weights.version, self.weights.checksum) == wanted:
                return wanted
            offer = _Offer(update)
            if self.session is None:
                return self._take(offer)
            if self.offer is not None:
                self.offer.give_up("a newer update came first")
            self.offer = offer
            self.session.update(lambda: self._take(offer)[0])
        return offer.reply()

    def weights_facts(self) -> Facts:
        """Where this worker is, for whoever sends weights."""
        return self.weights.facts()

    def put_weights(self, version: int, layout: Layout) -> Iterator[np.ndarray | int]:
        """The buckets of the version that was received last, and their number; see `Receiver.put`."""
        yield from self.weights.put(version, layout, self.engine.model.lm)

    def sleep(self) -> int:
        """Let go of weights and cache, until the next weight update; returns the bytes. Nothing can be sampled until then."""
        with self.lock:
            if self.session is not None:
                raise RolloutFailed(f"rollout worker {self.index} was asked to sleep in the middle of a unit")
            self.version = -1
            self.weights.forget()
            return sleep(self.engine)

    def _take(self, offer: _Offer) -> tuple[int, str]:
        wake(self.engine)  # which does nothing to one that is awake
        try:
            self.version = -1  # what is half loaded must not be sampled from
            reply = self.weights.receive(offer.update, self.engine.model.lm)
            self.version = reply[0]
        except Exception as error:
            offer.fail(error)
            raise
        finally:
            if self.offer is offer:  # a newer one may have come meanwhile
                self.offer = None
        offer.done(reply)
        return reply

    def abort(self, unit: str) -> None:
        """Drop a unit that is under way, or about to come."""
        self.aborted.add(unit)

    def generate(self, request: RolloutRequest) -> Iterator[RolloutPart]:
        """A part for each prompt, as soon as its samples are done. Raises WeightMismatch when the request is for newer weights
        than the ones loaded, RolloutFailed when it does not fit into memory, ConfigError when predictions are asked of a model
        that makes none."""
        session = self._open(request)
        found: list[Trajectory | None] = [None] * (len(request.prompts) * request.samples)
        reported = EngineCounters()
        try:
            for indices, trajectories in self._steps(session, request.unit):
                for index, trajectory in zip(indices, trajectories, strict=True):
                    found[index] = trajectory
                for place in sorted({index // request.samples for index in indices}):
                    group = found[place * request.samples : (place + 1) * request.samples]
                    if all(trajectory is not None for trajectory in group):
                        work, reported = session.counters - reported, dataclasses.replace(session.counters)
                        steps = zip(*map(self._step_texts, group), strict=True) if request.predictions else ()
                        yield RolloutPart(place, Trajectories.of(group), self._texts(group), work, *steps)
        finally:
            self._close(request.unit)

    def _steps(self, session: Session, unit: str) -> Iterator[tuple[list[int], list[Trajectory]]]:
        """What each step finishes, until all is done or nobody wants it any more."""
        while len(session.canvas) and unit not in self.aborted:
            done = session.step()
            if done is not None:
                yield done

    def _open(self, request: RolloutRequest) -> Session:
        with self.lock:
            if self.version < request.version:
                raise WeightMismatch(
                    f"rollout worker {self.index} holds weights of version {self.version}, asked for {request.version}"
                )
            tokens = [np.array(self.tokenizer(prompt.text)["input_ids"], np.int32) for prompt in request.prompts]
            wanted = [
                Request(prompt_ids=ids, uid=prompt.uid, sample=sample, seed=sample_seed(request.seed, prompt.uid, sample))
                for prompt, ids in zip(request.prompts, tokens, strict=True)
                for sample in range(request.samples)
            ]
            decoder = Decoder.resolve(request.decoder, self.engine.spec)
            free = free_memory(self.engine.model.device)
            slots = slots_that_fit(self.engine, wanted, decoder, self.slots or len(wanted), free)
            self.session = self.engine.session(
                wanted, decoder=decoder, version=self.version, slots=slots, predictions=request.predictions
            )
            return self.session

    def _close(self, unit: str) -> None:
        """The unit is over; an update that found no moment in it is taken now."""
        with self.lock:
            self.session = None
            self.aborted.discard(unit)
            if self.offer is not None:
                with contextlib.suppress(Exception):  # whoever brought it is told; the unit is done
                    self._take(self.offer)

    def _texts(self, group: Sequence[Trajectory]) -> tuple[str, ...]:
        return tuple(self._text(t.response_ids[: t.valid_len]) for t in group)

    def _text(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    def _step_texts(self, trajectory: Trajectory) -> tuple[tuple[str, ...], np.ndarray]:
        """(the different texts of its predictions in order of appearance, which of them each reads int32[S])."""
        cut = up_to_eos(trajectory.predictions.tokens, self.engine.spec.eos_token_ids)
        unlike, first, which = np.unique(cut, axis=0, return_index=True, return_inverse=True)
        texts: dict[str, int] = {}
        place = np.zeros(len(unlike), np.int32)
        for row in np.argsort(first):  # each different row is decoded once; different tokens may still read alike
            place[row] = texts.setdefault(self._text(unlike[row][unlike[row] != GONE]), len(texts))
        return tuple(texts), place[which.ravel()]

    def token_texts(self, responses: Sequence[np.ndarray]) -> list[list[str]]:
        """Each token of each response on its own, for display."""
        return [[self.tokenizer.decode([int(token)]) for token in response] for response in responses]


def _guide(cfg: ServerConfig | None, tokenizer: Any) -> Client | None:
    """The model that reads drafts, if there is one. Raises ConfigError if it reads other tokens."""
    if cfg is None or not cfg.url:
        return None
    guide = Client(cfg, "the guide")
    if not check_tokenizer(guide, tokenizer, timeout_s=GUIDE_S):
        log.warning("the guide's tokenizer cannot be compared with the model's; they must be the same")
    return guide


class _Offer:
    """A weight update on its way into a unit that is being sampled; the call that brought it waits for the reply."""

    def __init__(self, update: WeightUpdate):
        self.update = update
        self._settled = threading.Event()
        self._reply: tuple[int, str] | None = None
        self._error: Exception | None = None

    def done(self, reply: tuple[int, str]) -> None:
        self._reply = reply
        self._settled.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._settled.set()

    def give_up(self, reason: str) -> None:
        self.fail(WeightMismatch(f"weights of version {self.update.version} were not taken: {reason}"))

    def reply(self) -> tuple[int, str]:
        """Raises what went wrong. The caller has a deadline, so that this wait has one."""
        self._settled.wait()
        if self._error is not None:
            raise self._error
        return self._reply


def up_to_eos(tokens: np.ndarray, eos: Sequence[int]) -> np.ndarray:
    """tokens int32[S, L] with everything behind the first EOS of each row replaced by GONE."""
    ended = np.maximum.accumulate(np.isin(tokens, eos), axis=1)
    behind = np.pad(ended[:, :-1], ((0, 0), (1, 0)))
    return np.where(behind, GONE, tokens)


def slots_that_fit(engine: Engine, requests: Sequence[Request], decoder: Decoder, slots: int, free: float) -> int:
    """As many of `slots` as the cache has room for in `free` bytes, keeping a tenth of it. Raises RolloutFailed, with the
    arithmetic, if not even one request fits."""
    each = engine.cache_bytes(requests, decoder)
    room = int(0.9 * free // each) if each else slots
    if room < 1:
        longest = max(len(r.prompt_ids) for r in requests)
        raise RolloutFailed(
            f"the longest request (prompt of {longest} tokens, up to {decoder.max_tokens} new ones) needs "
            f"{each / 2**20:.1f} MiB of cache, and {free / 2**20:.1f} MiB are free, of which a tenth is kept. Lower "
            "rollout.decoder.max_tokens, drop long prompts, or give the worker more memory"
        )
    return min(slots, room)


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on the device; on a CPU what the kernel calls available."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux: nothing to go by
        return float("inf")
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), float("inf"))
