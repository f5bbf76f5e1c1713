"""Guided decoding: an autoregressive model with the same tokenizer reads each draft from left to right, and what it would have
written as well is committed (Guided Diffusion of FreeCache, arXiv 2505.21467).

In every step the diffusion model drafts all masked positions of the window. One causal forward of the guide over prompt,
committed tokens and draft gives its own most likely token at each of them, and the longest run of masked positions, from the
left, where draft and guide say the same is committed. The rule that keeps a bad guide from doing harm:

- Where the guide would commit fewer positions than the plain selector (`base`), the plain selector decides.
- After `patience` steps in a row in which it agreed with fewer than that, a request leaves the guide alone for 1 step, then for
  2, 4, 8 …, until it agrees again.

What follows from it:

- A guide that agrees with the first token of every draft decides everything when the plain selector takes one position: the
  text is the guide's greedy text, in at most as many forwards, and fewer as soon as any run is longer than one.
- A guide that never agrees is called at most patience + 1 + log2(F) times in a request of F steps. Without `correct` it changes
  no token: the samples are the plain decoder's, forward for forward.
- With a plain selector that commits by the schedule (`static` under `tokens`, `even` or the curves), a step commits at least
  its share whatever the guide says, so a block never has more masks than it would have without a guide and takes no more
  forwards. There is at most one call a forward: with a guide as costly as the model, never more than twice the plain cost.
  Selectors that commit by confidence meet other states under a guide; there each step commits at least what they would have
  committed in that very state.

The rule looks at one request alone, so a response depends on neither its neighbours nor its slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from rlpipe.errors import ConfigError, RolloutFailed

if TYPE_CHECKING:  # a canvas is made for a decoder, and a decoder may have guidance
    from rlpipe.sampling.canvas import Canvas

LONGEST_REST = 20  # as a power of two: longer than any response
PROBES = (  # what tokenizers of one family agree about and others split otherwise
    "The answer is 42.", "  def f(x):\n\treturn x**2  # twice\n\n", "\\boxed{\\frac{1}{2}} + 1234567", "Größe: 数学 → 🙂",
)  # fmt: skip


class Guide(Protocol):
    """An autoregressive model that shares the sampler's token ids."""

    def greedy_next(self, tokens: Sequence[Sequence[int]], *, timeout_s: float) -> list[np.ndarray]:
        """For each sequence of n token ids int32[n]: the most likely token after each of its positions. Raises what says why it
        could not."""
        ...


def check_tokenizer(guide: Guide, tokenizer: Callable, timeout_s: float) -> bool:
    """Raises ConfigError if the guide splits texts into other ids than the model's tokenizer does. False: it cannot be asked,
    because it has no `tokenize(text, *, timeout_s) -> ids` (without special tokens)."""
    ask = getattr(guide, "tokenize", None)
    if ask is None:
        return False
    for text in PROBES:
        ours = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        theirs = list(ask(text, timeout_s=timeout_s))
        if ours != theirs:
            raise ConfigError(
                f"the guide has another tokenizer than the model: {text!r} is {theirs} to it and {ours} to the model, and they "
                "exchange token ids; guide.model or guide.url must be of a model of the same family"
            )
    return True


@dataclass(frozen=True)
class Guidance:
    """The numbers of `select: guided`; those of the plain selector stand beside them in the decoder's options.

    base: the plain selector · correct: the guide's own token is written where it first disagrees, so the text is the guide's
    and the diffusion model only makes it faster (the speculative variant in FreeCache's repository; without it the paper's
    Guided Diffusion, in which every token is the diffusion model's) · patience: steps in a row that a guide may be of no use
    before it is asked more rarely, 0: it is always asked; with `correct` and one position a step the text is then the guide's
    greedy text whatever the guide says.

    Differs from the paper: drafts are drawn at the decoder's temperature instead of being the most likely tokens; where not
    even the first token agrees the plain selector decides, which is the published step (the draft's own first token) with
    `score: left_to_right`; and patience is ours.
    """

    base: str = "static"
    correct: bool = False
    patience: int = 4

    def __post_init__(self) -> None:
        if type(self.correct) is not bool:
            raise ConfigError(f"decoder.options.correct={self.correct!r}: true or false")
        if type(self.patience) is not int or self.patience < 0:
            raise ConfigError(f"decoder.options.patience={self.patience!r}: a number of steps, 0: the guide is always asked")


class Advice(NamedTuple):
    """Of one step. asked bool [n]: slots that the guide has read · answer int64 [n, B]: its most likely token at each position,
    -1 where there is none."""

    asked: torch.Tensor
    answer: torch.Tensor


class Choice(NamedTuple):
    """chosen, forced bool [n, B] · useful bool [n]: the guide agreed with at least as many positions as the plain selector
    takes · written bool [n, B]: its own tokens among the chosen, forced as well."""

    chosen: torch.Tensor
    forced: torch.Tensor
    useful: torch.Tensor
    written: torch.Tensor


def agreement(masked: torch.Tensor, draft: torch.Tensor, answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """masked bool, draft and answer int64 [n, B] → (agreed, refused), bool [n, B]: the masked positions before the first one
    whose draft is not the guide's answer, and that one. Committed tokens between them are context and not judged again."""
    wrong = masked & (draft != answer)
    seen = wrong.cumsum(-1)
    return masked & (seen == 0), wrong & (seen == 1)


def settle(base: tuple[torch.Tensor, torch.Tensor], agreed: torch.Tensor, written: torch.Tensor) -> Choice:
    """The guide's run where it is at least as long as what the plain selector takes, and not empty; else the plain choice.

    base: (commit, forced) of the plain selector · agreed: where draft and guide say the same, from the left · written: where
    the guide's own token could follow; both all False for slots where it was not asked. Everything bool [n, B].
    """
    commit, forced = base
    guided, count = agreed | written, commit.sum(-1)
    decides = (guided.any(-1) & (guided.sum(-1) >= count)).unsqueeze(-1)
    useful = agreed.any(-1) & (agreed.sum(-1) >= count)
    written = written & decides
    return Choice(torch.where(decides, guided, commit), torch.where(decides, written, forced), useful, written)


def next_rest(
    doubt: torch.Tensor, rest: torch.Tensor, asked: torch.Tensor, useful: torch.Tensor, ready: torch.Tensor, patience: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(doubt, rest), int64 [n], after a step of the slots `ready`: useless steps in a row, steps that the guide is left alone
    now. asked, useful, ready bool [n]."""
    doubt = torch.where(asked, torch.where(useful, 0, doubt + 1), doubt)
    tired = asked & (doubt >= patience) if patience else torch.zeros_like(asked)
    tired = tired & ~useful
    pause = 2 ** (doubt - patience).clamp(0, LONGEST_REST)
    return doubt, torch.where(tired, pause, torch.where(ready, (rest - 1).clamp_min(0), rest))


class Guided:
    """Asks the guide for the slots of a canvas; `timeout_s` is of one call, which serves all of them."""

    def __init__(self, guidance: Guidance, guide: Guide, timeout_s: float, canvas: Canvas, counters):
        self.guidance, self.guide, self.timeout_s = guidance, guide, timeout_s
        self.canvas, self.counters = canvas, counters

    def ask(self, position: torch.Tensor, masked: torch.Tensor, draft: torch.Tensor) -> Advice:
        """position int64, masked bool, draft int64 [n, B]: the window and what was drawn at its masked positions. Slots that
        have no mask, or whose guide is being left alone, are not asked. Raises RolloutFailed for an answer of another shape."""
        canvas = self.canvas
        asked = masked.any(-1) & (canvas.rest == 0)
        nothing = torch.full_like(draft, -1)
        slots = asked.nonzero().squeeze(1)
        if not len(slots):
            return Advice(asked, nothing)
        filled = canvas.ids.clone()
        slot, column = masked.nonzero(as_tuple=True)
        filled[slot, position[slot, column]] = draft[slot, column]
        last = torch.where(masked, position, 0).amax(-1)  # what stands at the last mask need not be read
        ids, lengths = filled[slots].cpu().numpy(), last[slots].tolist()
        sequences = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
        answers = self.guide.greedy_next(sequences, timeout_s=self.timeout_s)
        _check_answers(sequences, answers)
        after = np.full(ids.shape, -1, np.int64)
        for row, length, answer in zip(after, lengths, answers, strict=True):
            row[1 : length + 1] = answer
        nothing[slots] = torch.as_tensor(after, device=draft.device).gather(1, position[slots])
        self.counters.guide_calls += 1
        self.counters.guide_tokens += sum(lengths)
        self.counters.host_syncs += 3
        return Advice(asked, nothing)

    def remember(self, asked: torch.Tensor, useful: torch.Tensor, ready: torch.Tensor) -> None:
        """Count what the step showed of the guide; bool [n] each."""
        canvas = self.canvas
        canvas.doubt, canvas.rest = next_rest(canvas.doubt, canvas.rest, asked, useful, ready, self.guidance.patience)


def _check_answers(sequences: Sequence[Sequence[int]], answers: Sequence[np.ndarray]) -> None:
    wanted, given = [(len(row),) for row in sequences], [np.shape(answer) for answer in answers]
    if wanted != given:
        where = next((i for i, pair in enumerate(zip(wanted, given, strict=False)) if pair[0] != pair[1]), None)
        detail = f"{len(given)} answers to {len(wanted)}" if where is None else f"{given[where]} for {wanted[where]} tokens"
        raise RolloutFailed(
            f"the guide gave {detail} sequences; it must say its most likely token after every position of each, so the server "
            "has to return the log-probabilities of prompts"
        )
