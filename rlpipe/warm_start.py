"""Supervised warm start: masked-token cross-entropy on demonstrations, for models that know nothing yet.

Objective: in every block (block models) or canvas (full attention) n ~ U{1..size} response tokens are masked, exactly n of
them, and their cross-entropy is weighted 1/n (LLaDA, arXiv 2502.09992, with exact counts instead of Bernoulli masks).
Block models see the clean earlier blocks (BD3-LM, arXiv 2503.09573).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from rlpipe.config import RunConfig, WarmStartConfig
from rlpipe.contradictions import CONVERT, CONVERTED_BLOCK_SIZE, block_size
from rlpipe.errors import DataError
from rlpipe.models.conversion import converted
from rlpipe.models.hub import model_folder
from rlpipe.models.loading import load_model, load_tokenizer, save_model, settings_of
from rlpipe.models.made_once import made_once
from rlpipe.models.packing import make_piece, pack
from rlpipe.models.policy import DiffusionLM
from rlpipe.models.tiny import KINDS, build_tiny
from rlpipe.trajectory import Prompt

FORMAT = 2  # of the cache; raise it when the same settings would give other weights
WARMUP_STEPS = 50
BETAS = (0.9, 0.98)
FINAL_LR_SHARE = 0.1


def initial_model(cfg: RunConfig, source, progress: Callable[[int, int], None] | None = None) -> Path:
    """Folder with the weights that training starts from: the recipe's own, a tiny model, or `convert:SOURCE`, a causal LM made
    a diffusion LM (see `models.conversion`); warm-started if the recipe says so.

    Made once and cached under `<output_dir>/cache` by content: model, task, its records, warm start and seed. `source` is a
    prompt source (`alphabet`, `identity`, `demonstration(index)`). progress(done, total) is called every supervised step.
    """
    cfg = with_converted_model(cfg)
    if cfg.model.path not in KINDS and not cfg.warm_start.steps:
        folder = model_folder(cfg.model.path, cfg.model.revision)
        load_tokenizer(folder)
        return folder
    folder = Path(cfg.output_dir) / "cache" / f"initial-{_content_hash(cfg, source)}"
    if (folder / "config.json").is_file():
        return folder
    if cfg.model.path in KINDS:
        model, tokenizer = build_tiny(cfg.model, source.alphabet, cfg.seed)
    else:
        tokenizer = load_tokenizer(cfg.model.path, cfg.model.revision)
        model = load_model(cfg.model.path, cfg.model.dtype, **settings_of(cfg.model))
    if cfg.warm_start.steps:
        with _threads(cfg.learner.threads):
            losses = train(
                model, tokenizer, source.demonstration, cfg.warm_start, cfg.rollout.decoder.max_tokens, cfg.seed, progress
            )
    with made_once(folder) as partial:
        save_model(model, tokenizer, partial)
        facts = {"steps": cfg.warm_start.steps, "losses": losses if cfg.warm_start.steps else [], "task": cfg.data.task}
        (partial / "warm_start.json").write_text(json.dumps(facts | {"options": cfg.data.options}, indent=1), encoding="utf8")
    return folder


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch with so many threads: sums over other numbers of them are other numbers, so the machine must not choose."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_converted_model(cfg: RunConfig) -> RunConfig:
    """The configuration with the converted folder for `convert:SOURCE`; made once and cached. Others come back as they are."""
    if not cfg.model.path.startswith(CONVERT):
        return cfg
    cache = Path(cfg.output_dir) / "cache"
    folder = converted(cfg.model.path.removeprefix(CONVERT), cache, block_size(cfg) or CONVERTED_BLOCK_SIZE)
    return replace(cfg, model=replace(cfg.model, path=str(folder)))


def _content_hash(cfg: RunConfig, source) -> str:
    folder = Path(cfg.model.path)
    content = {
        "format": FORMAT,
        "model": asdict(cfg.model) | ({"path": str(folder.resolve())} if folder.is_dir() else {}),  # `latest` moves on
        "source": source.identity,
        "alphabet": source.alphabet if cfg.model.path in KINDS else "",  # of held-out records too
        "warm_start": asdict(cfg.warm_start),
        "data": asdict(cfg.data),
        "max_tokens": cfg.rollout.decoder.max_tokens,
        "threads": cfg.learner.threads,
        "seed": cfg.seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def train(
    model: DiffusionLM,
    tokenizer,
    demonstration: Callable[[int], Prompt],
    config: WarmStartConfig,
    max_tokens: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Train in place on fresh demonstrations; returns the loss of every step (nats per masked token, 1/n weighted)."""
    rng = np.random.default_rng([seed, 0x5F7])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step, config.steps))
    losses = []
    model.train()
    for step in range(config.steps):
        first = step * config.batch_size
        demonstrations = [demonstration(first + i) for i in range(config.batch_size)]
        loss = _loss(model, tokenizer, demonstrations, max_tokens, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(round(float(loss.detach()), 5))
        if progress is not None:
            progress(step + 1, config.steps)
    return losses


def _lr_share(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    done = max(0, step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return warm * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _loss(model: DiffusionLM, tokenizer, demonstrations: Sequence[Prompt], max_tokens: int, rng) -> torch.Tensor:
    spec, pieces, weights = model.spec, [], []
    for prompt in demonstrations:
        ids = np.array(tokenizer(prompt.text)["input_ids"], np.int32)
        response = response_ids(tokenizer, prompt, len(ids), max_tokens, spec.block_size)
        masked, weight = random_masks(len(ids), len(response), spec.block_size, rng)
        piece = make_piece(
            ids, response, masked, masked, block_size=spec.block_size, mask_id=spec.mask_token_id, logit_shift=spec.logit_shift
        )  # fmt: skip
        pieces.append(piece)
        weights.append(weight)
    offsets = np.cumsum([0, *map(len, weights)])[:-1]
    batch = pack(pieces, [piece.slot + start for piece, start in zip(pieces, offsets, strict=True)])
    logp, _ = model(batch.input_ids, batch.position_ids, batch.plan(), batch.index, batch.targets)
    weight = torch.from_numpy(np.concatenate(weights))[batch.slot]
    return -(weight * logp).sum() / weight.sum()


def response_ids(tokenizer, prompt: Prompt, prompt_len: int, max_tokens: int, block_size: int) -> np.ndarray:
    """int32: the demonstration, then EOS to the end of the terminal block (block models) or of the canvas.

    Raises DataError if there is no demonstration or it is longer than max_tokens.
    """
    if prompt.demonstration is None:
        raise DataError(
            f"{prompt.uid} has no demonstration, and supervised training needs one; add it, or set warm_start.steps=0"
        )
    ids = tokenizer(prompt.demonstration, add_special_tokens=False)["input_ids"]  # a first token of the text stands already
    if len(ids) > max_tokens:
        raise DataError(
            f"the demonstration of {prompt.uid} has {len(ids)} tokens; raise rollout.decoder.max_tokens ({max_tokens}), or "
            "remove it"
        )
    end = prompt_len + min(len(ids) + 1, max_tokens) if block_size else prompt_len + max_tokens
    if block_size:
        end = -(-end // block_size) * block_size
    return np.array(ids + [tokenizer.eos_token_id] * (end - prompt_len - len(ids)), np.int32)


def random_masks(prompt_len: int, response_len: int, block_size: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """(masked bool [1, L], weight float32 [number masked]): n ~ U{1..size} exact masks in each block, weighted 1/n."""
    size = block_size or response_len
    tail = prompt_len % block_size if block_size else 0
    blocks = (tail + response_len) // size
    noise = rng.random((blocks, size))
    noise.ravel()[:tail] = np.inf  # prompt tokens of the first block are never masked
    room = np.full(blocks, size)
    room[0] -= tail
    count = rng.integers(1, room + 1)
    rank = noise.argsort(-1).argsort(-1)
    masked = rank < count[:, None]
    weight = np.repeat(1.0 / count, count).astype(np.float32)
    return masked.ravel()[tail:][None], weight
