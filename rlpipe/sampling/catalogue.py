"""The named decoders as a table: what each records, and what of its likelihood a learner can reproduce.

`python -m rlpipe.sampling.catalogue` prints the page that is kept in docs/decoders.md.
"""

from __future__ import annotations

from rlpipe.decoder_presets import PRESETS, decoder_config
from rlpipe.models.spec import DiffusionSpec
from rlpipe.sampling.decoder import Decoder

HEADER = """# Named decoders

`rollout.decoder.preset=NAME` (or `eval.decoder.preset=NAME`) sets every decoder key but max_tokens, temperature, top_p and
top_k; keys given beside it win. Names stand for the published defaults. All of them differ from their references in this: noise
is one uniform per (seed, position, step) instead of Gumbel noise, a request's result never depends on its batch, ties go to the
lowest position, MASK is never drawn, and "above a threshold" means at least.

- step map: every position has one commit step. no: tokens can be taken back, and the record is an event log.
- likelihood: **exact**, the product of token probabilities is the transition probability (positions are chosen from the state
  alone; `score=max_prob` makes it so for most others) · **tokens**, positions depend on the draws, so that product is only a
  part of it, as in the published methods · **importance**, the recorded probability is not the learner's (stale keys, fused
  logits): the sample is flagged inexact, and the loss weighs its tokens by a truncated ratio.
- replay: a test reproduces the recorded log-probabilities from the record to 1e-5 (float32). gap: it shows the difference.
  Event logs are checked to lead to the final canvas.

| decoder | for | source | step map | likelihood | replay | differs |
|---|---|---|---|---|---|---|
"""


def page() -> str:
    """Markdown. Deterministic, so that a test can compare it with the file."""
    return HEADER + "".join(f"| {' | '.join(row)} |\n" for row in map(_row, PRESETS))


def _row(name: str) -> list[str]:
    preset = PRESETS[name]
    block = preset.attention == "block"
    spec = DiffusionSpec(mask_token_id=0, attention="block" if block else "full", block_size=4 if block else 0)
    decoder = Decoder.resolve(decoder_config(name), spec)
    if not decoder.replayable:
        likelihood, replay = "importance", "gap"
    else:
        likelihood, replay = "exact" if decoder.state_only else "tokens", "yes"
    if not decoder.monotone:
        likelihood, replay = "tokens", "event log"
    steps = "yes" if decoder.monotone else "no"
    return [f"`{name}`", preset.attention, preset.source, steps, likelihood, replay, preset.differs or "–"]


if __name__ == "__main__":
    print(page(), end="")
