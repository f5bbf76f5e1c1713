"""The verifier pool on a real Ray: crashes, hangs and exceptions fail their own group and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest

from rlpipe.cluster import Role, place
from rlpipe.config import VerifierConfig
from rlpipe.errors import VerifierFailed
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.pool import VerifierPool, _batches, _different
from rlpipe.verifiers.scorer import Scorer

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
    large = [(prompt, f"a{i}") for i in range(11)]
    scores = pool.score_groups([large, groups("b")[0], [*large[:9], (prompt, "raise"), *large]])
    assert scores[:2] == [[{"reward": 1.0}] * 11, [{"reward": 1.0}] * 2]
    assert isinstance(scores[2], VerifierFailed) and "large" in str(scores[2])


def test_equal_texts_are_judged_once(pool, tmp_path):
    prompt = Prompt(uid="p", task="t", text="")
    asked, judged = pool.asked, pool.judged
    once = f"once {tmp_path / 'seen'}"
    assert pool.score_states(prompt, ["a", "b", "a", once, once, "a"]) == [{"reward": 1.0}] * 6
    assert (pool.asked - asked, pool.judged - judged) == (6, 3)
    with pytest.raises(VerifierFailed, match="I cannot judge this"):
        pool.score_states(prompt, ["a", "raise"])
    assert pool.score_states(prompt, []) == []


def test_equal_texts_of_other_prompts_are_others():
    one, other = (Prompt(uid=uid, task="t", text="") for uid in "xy")
    assert _different([(one, "a"), (other, "a"), (one, "b"), (one, "a")]) == (
        [0, 1, 2, 0],
        [(one, "a"), (other, "a"), (one, "b")],
    )


def test_prompts_and_parts_of_all_kinds_share_a_pool(ray_session):
    placement = place([Role("verifier", 1, 0.1)], 60)
    cfg = VerifierConfig(parts={"task": 1.0, "format": 0.5}, options={"extract": "boxed"}, workers=1)
    pool = VerifierPool(cfg, "math", placement)
    try:
        easy = Prompt(uid="m", task="t", text="", answer={"answer": "1/2"})
        game = Prompt(uid="c", task="t", text="", answer={"numbers": [1, 2], "target": 3}, verifier="countdown")
        texts = r"\boxed{\frac{1}{2}}", "0.5", r"\boxed{1+2}"
        scores = pool.score_groups([[(prompt, text) for text in texts] for prompt in (easy, game)])
    finally:
        pool.close()
        placement.remove()
    assert [[s["reward"] for s in score] for score in scores] == [[1.5, 0.0, 0.5], [0.5, 0.0, 1.5]]
    assert scores[0][0] == {"reward": 1.5, "correct": 1.0, "task": 1.0, "task_timeout": 0.0, "format": 1.0}


def test_batches_keep_groups_whole():
    sized = [[None] * n for n in (3, 3, 1, 9, 2)]
    assert _batches(sized, 4) == [[0], [1, 2], [3], [4]]
    assert [i for batch in _batches(sized, 100) for i in batch] == list(range(5))


def test_verifiers_that_limit_themselves_are_given_the_time_for_it(pool):
    stdio = {"tests": {"kind": "stdio", "inputs": ["1"] * 5, "outputs": ["1"] * 5, "time_limit_s": 2.0}}
    code = Prompt(uid="code", task="t", text="", verifier="code", answer=stdio)
    math = Prompt(uid="math", task="t", text="", verifier="math", answer={"answer": "1"})
    plain = Prompt(uid="plain", task="t", text="")
    assert pool._deadline([[[(plain, "a")] * 9]]) == 4.0, "of the configuration: the verifier sets itself no limit"
    assert pool._deadline([[[(math, "a")] * 2], [[(plain, "a")]]]) == 2 * 4 * 2.0
    assert pool._deadline([[[(code, "a")], [(code, "a"), (plain, "a")]]]) == 2 * 5 * (2 * 2.0 + 2), "each input to its end"
    broken = Prompt(uid="broken", task="t", text="", verifier="no such", answer={"tests": {"time_limit_s": "x"}})
    assert pool._deadline([[[(broken, "a")], [(replace(broken, verifier="code"), "a")]]]) == 3 * 12.0, "judging it says why"


def test_a_limit_set_by_an_option_counts():
    math = Prompt(uid="math", task="t", text="", answer={"answer": "1"})
    assert Scorer(VerifierConfig(name="math", options={"seconds": 30.0}), "").longest(math) == 4 * 30.0
