"""The actor around the engine: holds one copy of the model, samples units of work, takes weight updates in place."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rlpipe.config import DecoderConfig, ModelConfig
from rlpipe.errors import RolloutFailed, WeightMismatch
from rlpipe.models.loading import load_model, load_tokenizer, settings_of
from rlpipe.models.weights import Manifest, load_buckets
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.engine import Engine, EngineCounters
from rlpipe.sampling.noise import sample_seed
from rlpipe.sampling.request import Request
from rlpipe.trajectory import Prompt, Trajectories, Trajectory

GONE = -1  # no token has this id


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One unit of work: `samples` responses to each prompt, sampled together. version: of the weights it must be done with.
    seed: the run's; each response's own noise seed follows from it, the prompt's uid and the sample's index, so a repeated
    request gives the same responses. predictions: the full prediction is recorded every so many denoising steps, 0: never."""

    prompts: tuple[Prompt, ...]
    samples: int
    decoder: DecoderConfig
    version: int
    seed: int
    predictions: int = 0


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
    """Waits for: nothing. Consumes: requests and weight updates, one at a time. Produces: trajectories as they come."""

    def __init__(self, index: int, model_folder: str, model: ModelConfig, threads: int, slots: int = 0):
        torch.set_num_threads(threads)
        self.index, self.slots = index, slots
        device = "cuda" if torch.cuda.is_available() else "cpu"
        policy = load_model(model_folder, model.dtype, device=device, **settings_of(model))
        self.tokenizer = load_tokenizer(model_folder)
        self.engine = Engine(policy)
        self.version = -1  # nothing is sampled before the first weight update

    def pid(self) -> int:
        return os.getpid()

    def load_weights(self, manifest: Manifest, *buckets: np.ndarray) -> tuple[int, str]:
        """Take a weight update; returns (version, checksum) for the driver to compare."""
        load_buckets(self.engine.model.lm, manifest, buckets)
        self.version = manifest.version
        return self.version, manifest.checksum

    def generate(self, request: RolloutRequest) -> Iterator[RolloutPart]:
        """A part for each prompt, as soon as its samples are done. Raises WeightMismatch when the request is for other weights
        than the ones loaded, RolloutFailed when it does not fit into memory, ConfigError when predictions are asked of a model
        that makes none."""
        if request.version != self.version:
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
        slots = slots_that_fit(self.engine, wanted, decoder, self.slots or len(wanted), free_memory(self.engine.model.device))
        session = self.engine.session(
            wanted, decoder=decoder, version=self.version, slots=slots, predictions=request.predictions
        )
        found: list[Trajectory | None] = [None] * len(wanted)
        reported = EngineCounters()
        for indices, trajectories in session:
            for index, trajectory in zip(indices, trajectories, strict=True):
                found[index] = trajectory
            for place in sorted({index // request.samples for index in indices}):
                group = found[place * request.samples : (place + 1) * request.samples]
                if all(trajectory is not None for trajectory in group):
                    work, reported = session.counters - reported, dataclasses.replace(session.counters)
                    steps = zip(*map(self._step_texts, group), strict=True) if request.predictions else ()
                    yield RolloutPart(place, Trajectories.of(group), self._texts(group), work, *steps)

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
