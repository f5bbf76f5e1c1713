"""The verifier pool on a real Ray: crashes, hangs and exceptions fail their own group and nothing else."""

from pathlib import Path

import pytest

from rlpipe.cluster import Role, place
from rlpipe.config import VerifierConfig
from rlpipe.errors import VerifierFailed
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.pool import VerifierPool, _batches

FAULTY = f"{Path(__file__).parent / 'faulty_verifiers.py'}:misbehave"


@pytest.fixture(scope="module")
def pool(ray_session):
    placement = place([Role("verifier", 2, 0.1)], 60)
    made = VerifierPool(VerifierConfig(name=FAULTY, workers=2, batch_size=4, timeout_s=4.0, retries=1), "sudoku", placement)
    yield made
    made.close()
    placement.remove()


def groups(*responses: str):
    """A group of two responses for each given one; the second is harmless."""
    return [[(Prompt(uid=f"g{i}", task="t", text=""), text) for text in (r, "fine")] for i, r in enumerate(responses)]


def test_all_is_well(pool):
    assert pool.score_groups(groups(*["a"] * 7)) == [[{"reward": 1.0}] * 2] * 7
    assert pool.score_groups([]) == []


@pytest.mark.parametrize("fault, cause", [("raise", "I cannot judge this"), ("die", "died"), ("hang", "deadline")])
def test_the_guilty_group_fails_with_its_cause_and_no_other(pool, fault, cause):
    before = pool.pool.restarts
    scores = pool.score_groups(groups("a", fault, "a", "a", "a"))
    assert [isinstance(s, VerifierFailed) for s in scores] == [False, True, False, False, False]
    assert "g1" in str(scores[1]) and cause in str(scores[1])
    assert all(s == [{"reward": 1.0}] * 2 for i, s in enumerate(scores) if i != 1)
    assert (pool.pool.restarts > before) == (fault != "raise")


def test_a_worker_killed_in_mid_call_costs_nothing(pool, tmp_path):
    scores = pool.score_groups(groups("slow", f"once {tmp_path / 'seen'}", "slow", "a"))
    assert scores == [[{"reward": 1.0}] * 2] * 4 and (tmp_path / "seen").exists()


def test_a_large_group_is_scored_by_several_calls(pool):
    prompt = Prompt(uid="large", task="t", text="")
    large = [(prompt, "a")] * 11
    scores = pool.score_groups([large, groups("b")[0], [*large[:9], (prompt, "raise"), *large]])
    assert scores[:2] == [[{"reward": 1.0}] * 11, [{"reward": 1.0}] * 2]
    assert isinstance(scores[2], VerifierFailed) and "large" in str(scores[2])


def test_batches_keep_groups_whole():
    sized = [[None] * n for n in (3, 3, 1, 9, 2)]
    assert _batches(sized, 4) == [[0], [1, 2], [3], [4]]
    assert [i for batch in _batches(sized, 100) for i in batch] == list(range(5))
