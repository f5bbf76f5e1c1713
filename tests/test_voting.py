"""Majority answers, and the HEX ensemble over block lengths."""

from types import SimpleNamespace

import numpy as np
import pytest

from rlpipe.config import DecoderConfig
from rlpipe.evaluation.measures import voted
from rlpipe.evaluation.training import evaluate, evaluate_hex
from rlpipe.voting import answer_of, majority


def test_an_answer_is_the_last_box_or_the_text():
    assert answer_of("so \\boxed{1} no, \\boxed{ \\frac{1}{2} }.") == "\\frac{1}{2}"
    assert answer_of(" 12\n34 ") == "1234"
    assert answer_of("\\boxed{never closed") == "\\boxed{neverclosed" and answer_of("  ") == ""


@pytest.mark.parametrize(
    "texts, winner",
    [(["a", "b", "b"], 1), (["a", "b"], 0), (["", "", "b"], 2), (["", ""], 0), (["b", "a", " a", "b", "c"], 0), (["x"], 0)],
)
def test_majority(texts, winner):
    assert majority(texts) == winner


def test_nobody_to_vote():
    with pytest.raises(ValueError):
        majority([])


def test_votes_are_scored():
    rewards = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    assert voted([["a", "b", "b"], ["a", "b", "b"]], rewards).tolist() == [1.0, 0.0]


class Rollouts:
    """Answers the block length, or for block 8 what is right."""

    def stream(self, prompts, samples, decoder, *, what, seed):
        events = SimpleNamespace(step=np.arange(3))
        made = [SimpleNamespace(uid="", sample=i, valid_len=4, events=events, stop="eos", exact=True) for i in range(samples)]
        text = "right" if decoder.block_size in (8, 16) else str(decoder.block_size)
        for index in reversed(range(len(prompts))):
            yield index, SimpleNamespace(texts=[text] * samples, trajectories=made), None


class Verifiers:
    def score_groups(self, groups):
        return [[{"reward": float(text == "right")} for _, text in group] for group in groups]


def test_hex_scores_what_most_block_lengths_say():
    metrics = evaluate_hex(Rollouts(), Verifiers(), ["p", "q"], DecoderConfig(), 1, [4, 8, 16, 32])
    assert metrics == {"eval/hex": 1.0, "eval/hex_members": 0.5}
    plain = evaluate(Rollouts(), Verifiers(), ["p"], DecoderConfig(block_size=8), 3, "accuracy")
    assert plain["eval/accuracy_majority"] == 1.0 and plain["eval/accuracy_tokens_per_step"] == pytest.approx(4 / 3)
