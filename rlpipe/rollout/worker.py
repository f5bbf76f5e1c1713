"""The actor around the engine: holds one copy of the model, samples units of work, takes weight updates in place."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlpipe.config import DecoderConfig, ModelConfig
from rlpipe.errors import WeightMismatch
from rlpipe.models.loading import load_model, load_tokenizer
from rlpipe.models.weights import Manifest, load_buckets
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.engine import Engine, EngineCounters
from rlpipe.sampling.noise import sample_seed
from rlpipe.sampling.request import Request
from rlpipe.trajectory import Prompt, Trajectories


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One unit of work: `samples` responses to each prompt, sampled together. version: of the weights it must be done with.
    seed: the run's; each response's own noise seed follows from it, the prompt's uid and the sample's index, so a repeated
    request gives the same responses."""

    prompts: tuple[Prompt, ...]
    samples: int
    decoder: DecoderConfig
    version: int
    seed: int


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """trajectories: prompt after prompt, its samples in order. texts: decoded up to the first EOS, without it."""

    trajectories: Trajectories
    texts: tuple[str, ...]
    counters: EngineCounters


class RolloutWorker:
    """Waits for: nothing. Consumes: requests and weight updates, one at a time. Produces: trajectories and texts."""

    def __init__(self, index: int, model_folder: str, model: ModelConfig, threads: int):
        torch.set_num_threads(threads)
        self.index = index
        policy = load_model(model_folder, model.dtype, model.block_size)
        if torch.cuda.is_available():
            policy = policy.cuda()
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

    def generate(self, request: RolloutRequest) -> RolloutResult:
        """Raises WeightMismatch when the request is for other weights than the ones loaded."""
        if request.version != self.version:
            raise WeightMismatch(
                f"rollout worker {self.index} holds weights of version {self.version}, asked for {request.version}"
            )
        start = time.perf_counter()
        tokens = [np.array(self.tokenizer(prompt.text)["input_ids"], np.int32) for prompt in request.prompts]
        wanted = [
            Request(prompt_ids=ids, uid=prompt.uid, sample=sample, seed=sample_seed(request.seed, prompt.uid, sample))
            for prompt, ids in zip(request.prompts, tokens, strict=True)
            for sample in range(request.samples)
        ]
        decoder = Decoder.resolve(request.decoder, self.engine.spec)
        trajectories, counters = self.engine.sample(wanted, decoder=decoder, version=self.version)
        texts = tuple(
            self.tokenizer.decode(t.response_ids[: t.valid_len].tolist(), skip_special_tokens=True) for t in trajectories
        )
        counters.seconds = time.perf_counter() - start
        return RolloutResult(trajectories, texts, counters)

    def token_texts(self, responses: Sequence[np.ndarray]) -> list[list[str]]:
        """Each token of each response on its own, for display."""
        return [[self.tokenizer.decode([int(token)]) for token in response] for response in responses]
