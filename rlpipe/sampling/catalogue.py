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
  logits): the sample is flagged inexact, and the loss weighs its tokens by a truncated ratio · **guide**, some tokens are the
  guide's and no draws: shown to the learner, never scored, the sample is flagged inexact.
- replay: a test reproduces the recorded log-probabilities from the record to 1e-5 (float32). gap: it shows the difference.
  Event logs are checked to lead to the final canvas.

| decoder | for | source | step map | likelihood | replay | differs |
|---|---|---|---|---|---|---|
"""

GUIDED = """
## Guided decoding

`select: guided` lets an autoregressive model with the same tokenizer read every draft (Guided Diffusion, FreeCache,
arXiv 2505.21467). A step is one forward of the diffusion model, which drafts all masked positions of its window (block, or
canvas), and one call of the guide for all requests together, which says what it would have written at each of them given the
tokens before. The longest run of masked positions, from the left, where the two agree is committed.

```bash
python -m rlpipe.run recipe=… rollout.decoder.preset=freecache_guided guide.url=http://HOST:8000/v1   # a server that is there
python -m rlpipe.run recipe=… rollout.decoder.preset=freecache_guided guide.model=Qwen/Qwen2.5-0.5B   # one that vLLM starts
python -m rlpipe.run recipe=… guide.url=… 'eval.decoder={preset: freecache_speculative, temperature: 0}'   # evaluations alone
python -m rlpipe.run recipe=… guide.url=… 'rollout.decoder={select: guided, options: {base: threshold, patience: 2}}'
```

`options`: `base`, the plain selector (`static`), whose own numbers stand beside it · `correct`, the guide's token is written
where it first disagrees (`false`) · `patience` (4). The rule:

1. Where the guide would commit fewer positions than the plain selector, the plain selector decides. With
   `score: left_to_right` and one token a step, as in the preset, that is the published step: of a draft whose first token the
   guide refuses, that token is committed all the same.
2. After `patience` steps in a row in which it agreed with fewer positions than the plain selector took, a request leaves the
   guide alone for 1 step, then for 2, 4, 8 …; once it agrees it is trusted again. 0: it is always asked.

- **A perfect guide**, one that agrees with the first token of every draft: the text is the guide's greedy text, in no more
  forwards than the plain decoder, and fewer as soon as a draft is right about two tokens in a row. With `correct: true`,
  `patience: 0` and one token a step the same holds for every guide, however seldom it agrees.
- **A useless guide**, one that never agrees, is asked at most `patience` + 1 + log2 F times in a request of F steps. Without
  `correct` it changes nothing: the samples are the plain decoder's, token for token.
- **In between**, a step commits at least what the plain selector would have committed in that state, and asks at most once.
  With schedules that fix the number of commits (`tokens`, `even`, the curves; `select: static`) it follows by induction over
  the steps that a block takes no more forwards than without a guide, so forwards and calls together are at most twice the
  plain decoder's, whatever the guide says. `python -m rlpipe.bench guided` measures it with a guide as costly as the model.

**What reinforcement learning on guided samples means.** Without `correct` every token is a draw of the policy, recorded with
its probability in the state it was drawn in, and a learner replays it to 1e-5. Which draws are kept depends on the guide: a
draw behind the first is kept if the guide agrees and is otherwise drawn again, so the text leans towards the guide's wherever
the policy is undecided, and the product of the token probabilities is a part of the likelihood, as with every decoder that
keeps tokens by what was drawn (**tokens** above). What is optimised is the policy with its guide: evaluate with the decoder
that will be used, and look at `rollout/tokens_per_step` for what the guide is worth. With `correct` the guide writes the text;
samples of one prompt are then alike and teach nothing, so `rollout.decoder` refuses it. Its tokens are recorded as put there
by rule (`preset`, `forced`), with the policy's log-probability for them; objectives show them and score only what was drawn.

**The tokenizer** must be the model's: ids go to the server as they are. A worker compares both on a few texts when it starts
and refuses a guide that splits them otherwise. A guide sees prompt and response only, as ids, up to the last masked position of
the window: `max-model-len` of its server must hold the longest of both and one token more. A guide that does not answer in
time fails the unit of work, which is tried again; it never falls back to plain samples silently. A server's arithmetic may
depend on what else it computes at the moment, so where the guide wavers between two tokens a repeated unit may differ.
"""


def page() -> str:
    """Markdown. Deterministic, so that a test can compare it with the file."""
    return HEADER + "".join(f"| {' | '.join(row)} |\n" for row in map(_row, PRESETS)) + GUIDED


def _row(name: str) -> list[str]:
    preset = PRESETS[name]
    block = preset.attention == "block"
    spec = DiffusionSpec(mask_token_id=0, attention="block" if block else "full", block_size=4 if block else 0)
    decoder = Decoder.resolve(decoder_config(name), spec)
    if decoder.written_by_guide:
        likelihood, replay = "guide", "yes"
    elif not decoder.replayable:
        likelihood, replay = "importance", "gap"
    else:
        likelihood, replay = "exact" if decoder.state_only else "tokens", "yes"
    if not decoder.monotone:
        likelihood, replay = "tokens", "event log"
    steps = "yes" if decoder.monotone else "no"
    return [f"`{name}`", preset.attention, preset.source, steps, likelihood, replay, preset.differs or "–"]


if __name__ == "__main__":
    print(page(), end="")
