"""The rollout engine: many requests through one packed forward a step.

A step asks the cache policy which positions to forward, packs them over all slots, lets the LM head see only rows whose
position is masked and may be committed, and hands their statistics to scorer, selector and editor. Block models use an exact
block cache: prompts are prefilled once a group and without logits, and a finished block is committed by the first step of the
next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from rlpipe.errors import ConfigError
from rlpipe.models.attention import SlotCache
from rlpipe.models.policy import DiffusionLM
from rlpipe.sampling.canvas import Canvas
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.guidance import Guide, Guided
from rlpipe.sampling.predictions import PredictionLog, check_predictions
from rlpipe.sampling.record import EditLog, record
from rlpipe.sampling.request import Request
from rlpipe.sampling.step import StepSampler
from rlpipe.trajectory import Trajectories, Trajectory

NO_GUIDE = (
    "decoder.select=guided needs an autoregressive guide with the model's tokenizer: set guide.url=http://HOST:8000/v1 of a "
    "server that is there, or guide.model=FOLDER to start one"
)


@dataclass(slots=True)
class EngineCounters:
    """Work done by the engine. seconds: wall clock; tokens: committed and valid; head_rows: rows of the LM head; prefill_rows:
    those of the rows that only fill the cache; slot_steps: slots that denoised, summed over the steps; slots: that could have,
    summed likewise; host_syncs: values that the host waited for; guide_calls, guide_tokens: calls of a guide and the tokens
    that it read; guide_agreed, guide_written: tokens committed because it agreed, and its own."""

    seconds: float = 0.0
    forwards: int = 0
    rows: int = 0
    prefill_rows: int = 0
    head_rows: int = 0
    tokens: int = 0
    responses: int = 0
    cache_bytes: int = 0
    slot_steps: int = 0
    slots: int = 0
    host_syncs: int = 0
    guide_calls: int = 0
    guide_tokens: int = 0
    guide_agreed: int = 0
    guide_written: int = 0

    def __add__(self, other: EngineCounters) -> EngineCounters:
        """Work of both, the larger cache."""
        summed = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return EngineCounters(**summed | {"cache_bytes": max(self.cache_bytes, other.cache_bytes)})

    def __sub__(self, earlier: EngineCounters) -> EngineCounters:
        """Work since `earlier`; the cache as it is."""
        left = {f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)}
        return EngineCounters(**left | {"cache_bytes": self.cache_bytes})

    @property
    def occupancy(self) -> float:
        """Share of the slots that denoised, over all steps."""
        return self.slot_steps / self.slots if self.slots else 0.0


class Engine:
    """Samples responses with one model. guide: for decoders with `select: guided`; guide_timeout_s: of one call of it, which
    serves all slots of a step. Not thread-safe."""

    def __init__(self, model: DiffusionLM, guide: Guide | None = None, guide_timeout_s: float = 120.0):
        self.model = model
        self.guide, self.guide_timeout_s = guide, guide_timeout_s
        self.spec = model.spec
        self.spare: SlotCache | None = None  # of the last session, so that the next need not allocate

    def session(
        self, requests: Sequence[Request], *, decoder: Decoder, version: int, slots: int = 0, predictions: int = 0
    ) -> Session:
        """Requests to be stepped through by the caller; see `Session`. predictions: every so many denoising steps (and at the
        first and the last) the full prediction is recorded, 0: never; what is sampled stays the same. Raises ConfigError
        for predictions of a model or decoder that does not make them, and for a guided decoder without a guide."""
        if decoder.guidance is not None and self.guide is None:
            raise ConfigError(NO_GUIDE)
        if predictions:
            check_predictions(decoder, self.spec)
        return Session(self, requests, decoder, version, slots or len(requests), predictions)

    def sample(
        self,
        requests: Sequence[Request],
        *,
        decoder: Decoder,
        version: int,
        slots: int = 0,
        progress: Callable[[int, int], None] | None = None,
        predictions: int = 0,
    ) -> tuple[Trajectories, EngineCounters]:
        """One trajectory per request, in the order given, at most `slots` of them at a time (0: all at once).

        version: of the weights now loaded. progress(done, total) is called when requests finish. A response depends on neither
        the slots nor its neighbours. predictions: see `session`. Raises RolloutFailed for requests that cannot be served.
        """
        session = self.session(requests, decoder=decoder, version=version, slots=slots, predictions=predictions)
        found: list = [None] * len(requests)
        finished = 0
        for indices, trajectories in session:
            for index, trajectory in zip(indices, trajectories, strict=True):
                found[index] = trajectory
            finished += len(indices)
            if progress is not None:
                progress(finished, len(requests))
        return Trajectories.of(found), session.counters

    def cache_bytes(self, requests: Sequence[Request], decoder: Decoder) -> int:
        """Cache of one slot that can hold the longest of the requests."""
        longest = max(request.total_len(decoder.max_tokens) for request in requests)
        if self.spec.block_size:
            longest = -(-longest // self.spec.block_size) * self.spec.block_size
        shape = _cache_shape(self.model, decoder)
        width = torch.finfo(self.model.lm.dtype).bits // 8
        return 2 * shape["layers"] * longest * shape["kv_heads"] * shape["head_dim"] * width


class Session:
    """A set of requests on its way, the longest first: they decide when the last one is done.

    Iterating steps the engine and yields ([index of each request], [its trajectory]) whenever some are done. `update` loads new
    weights between steps.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[Request], decoder: Decoder, version: int, slots: int, predictions: int = 0
    ):
        self.engine, self.model, self.decoder = engine, engine.model.eval(), decoder
        model = self.model
        self.order = sorted(range(len(requests)), key=lambda i: -requests[i].total_len(decoder.max_tokens))
        self.requests = requests = [requests[i] for i in self.order]
        self.settings = decoder.settings()
        self.counters = EngineCounters(responses=len(requests))
        self.canvas = Canvas(requests, slots, decoder, model.spec, model.device)
        self.canvas.version = version
        self.slots = len(self.canvas)
        width = decoder.block_size or self.canvas.ids.shape[1]
        extra = width if decoder.editor is not None and decoder.editor.uses_shadow else 0
        shape = _cache_shape(model, decoder) | {"dtype": model.lm.dtype, "device": model.device}
        self.cache = SlotCache.reuse(engine.spare, slots=self.slots, positions=self.canvas.ids.shape[1] + extra, **shape)
        engine.spare = None
        self.counters.cache_bytes = self.cache.nbytes
        self.log = None if decoder.monotone else EditLog()
        self.predictions = PredictionLog(predictions) if predictions else None
        guided = None
        if decoder.guidance is not None:
            asking = (decoder.guidance, engine.guide, engine.guide_timeout_s)
            guided = Guided(*asking, self.canvas, self.counters)
        extras = (self.log, self.predictions, guided)
        self.sampler = StepSampler(model, requests, decoder, self.canvas, self.cache, self.counters, *extras)
        self.sharing = bool(model.spec.block_size) and self.canvas.wait_for_prompts()
        self._update: tuple[Callable[[], int], bool] | None = None

    def __iter__(self) -> Iterator[tuple[list[int], list[Trajectory]]]:
        while len(self.canvas):
            done = self.step()
            if done is not None:
                yield done

    def update(self, load: Callable[[], int], recompute: bool = True) -> None:
        """Load new weights as soon as every slot stands between two blocks, so that each block is sampled with one version;
        slots that get there first wait. load() copies in place and returns the version. recompute: stored keys and values are
        computed again under the new weights (exact, one prefill a slot); otherwise the old ones stay, and samples begun before
        are inexact. A whole-canvas decoder has no boundaries: it takes the weights at once, and a trajectory keeps the oldest
        version.
        """
        self._update = (load, recompute)

    @torch.inference_mode()
    def step(self) -> tuple[list[int], list[Trajectory]] | None:
        """One forward; what it finished, if anything."""
        start = time.perf_counter()
        if self._update is not None:
            self._take_update()
        self.sampler.step()
        if self.sharing:  # before any slot is given away: it may be the one that has just stored a prompt
            self._share_prompts()
        done = self.canvas.advance()
        finished = self._finish(done) if bool(done.any()) else None
        if not len(self.canvas):
            self.engine.spare = self.cache
        self.counters.host_syncs += 1
        self.counters.slots += self.slots
        self.counters.seconds += time.perf_counter() - start
        return finished

    def _finish(self, done: torch.Tensor) -> tuple[list[int], list[Trajectory]]:
        slots = _harvest(self.canvas, done)
        for log in (self.log, self.predictions):
            if log is not None:
                log.close(slots)
        indices = [int(slot["request"]) for slot in slots]
        trajectories = record(slots, [self.requests[i] for i in indices], self.settings, self.model.spec)
        self.counters.tokens += sum(trajectory.valid_len for trajectory in trajectories)
        kept, given, source = self.canvas.release(done)
        if len(given):
            self.cache.copy_prefix(source, given, int(self.canvas.prefix_len().max()))
        fresh = done if kept is None else done[kept]
        if kept is not None:
            self.cache.keep(kept)
        self.sampler.moved(kept, fresh)
        if self.model.spec.block_size and bool((fresh & (self.canvas.clean == 0)).any()):
            self.sharing = self.canvas.wait_for_prompts()
        return [self.order[i] for i in indices], trajectories

    def _share_prompts(self) -> None:
        slots, donors = self.canvas.served()
        if len(slots):
            self.cache.copy_prefix(donors, slots, int(self.canvas.prefix_len().max()))
        self.sharing = bool(self.canvas.waiting.any())

    def _take_update(self) -> None:
        load, recompute = self._update
        canvas, at_once = self.canvas, not self.decoder.block_size
        canvas.paused = canvas.opening | at_once
        if not bool(canvas.paused.all()):
            return
        self._update = None  # before the load: a newer update may come while it lasts
        canvas.version = load()
        if recompute:
            canvas.clean = torch.zeros_like(canvas.clean)
            canvas.refresh = torch.ones_like(canvas.refresh)
        else:
            canvas.stale = canvas.step > 0
        canvas.paused = torch.zeros_like(canvas.paused)


def _cache_shape(model: DiffusionLM, decoder: Decoder) -> dict[str, int]:
    """A policy that keeps nothing between forwards lets one layer's storage serve all of them in turn."""
    config = model.lm.config
    return {
        "layers": config.num_hidden_layers if decoder.cache.keeps else 1,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }


def _harvest(canvas: Canvas, done: torch.Tensor) -> list[dict[str, np.ndarray]]:
    """Copies of the finished slots, on the host."""
    rows = done.nonzero().squeeze(1)
    columns = {
        k: getattr(canvas, k) for k in ("request", "ids", "prompt_len", "limit", "end", "block_end", "stop_ids", "stale")
    }
    host = {k: v[rows].cpu().numpy() for k, v in (columns | canvas.trace).items()}
    return [{k: v[i] for k, v in host.items()} for i in range(len(rows))]
