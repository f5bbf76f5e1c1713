"""Verifiers that combine: weights, options, formats, lengths, prompts with their own verifier, and answers nobody can read."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlpipe.config import VerifierConfig
from rlpipe.errors import ConfigError, DataError
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.answers import extract
from rlpipe.verifiers.checking import check_answers
from rlpipe.verifiers.registry import BUILT_IN, correctness, load_verifier, options_of, score
from rlpipe.verifiers.scorer import Scorer

OWN = f"{Path(__file__).parent / 'clue_verifier.py'}:share"

GAME = {"numbers": [3, 5, 7], "target": 22}


def prompt(uid="u", text="12_4", verifier="", **answer):
    return Prompt(uid=uid, task="t", text=text, answer=answer, verifier=verifier)


def scorer(default="exact", **settings):
    return Scorer(VerifierConfig(**settings), default)


@pytest.mark.parametrize(
    "where, text, answer",
    [
        ("whole", " 5 ", "5"), ("whole", " ", None), ("last_line", "a\n b \n\n", "b"), ("last_line", "", None),
        ("tag", "<answer> 5 </answer>", "5"), ("tag", "<answer>4</answer> <answer>5</answer> 6", "5"),
        ("tag", "<answer></answer>", None),
        ("tag", "<answer>5", None), ("tag", "5</answer>", None), ("tag", "5", None),
        ("tag", "<answer>4</answer><answer>5", "4"),
        ("boxed", r"\boxed{4} \boxed{5}", "5"), ("boxed", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed{a\}b}", r"a\}b"),
        ("boxed", r"\boxed{4} \boxed{5", None), ("boxed", r"\boxed{}", None), ("boxed", "5", None),
        ("boxed", r"\boxed {5}", "5"),
        ("auto", r"<answer>4</answer> \boxed{5}", "4"), ("auto", r"\boxed{5} 6", "5"), ("auto", " 6", "6"),
        ("auto", r"\boxed{5", None),
    ],
)  # fmt: skip
def test_answers_are_found_where_they_stand(where, text, answer):
    assert extract(text, where) == answer


def test_an_unknown_place_is_refused():
    with pytest.raises(ConfigError, match="did you mean boxed"):
        extract("5", "boxd")


@pytest.mark.parametrize(
    "name, answer, options, response, reward",
    [
        ("exact", {"answer": "42"}, {"extract": "tag"}, "I think <answer>42</answer>", 1.0),
        ("exact", {"answer": "42"}, {"extract": "tag"}, "42", 0.0),
        ("countdown", GAME, {"extract": "tag"}, "<answer>3*5+7</answer>", 1.0),
        ("countdown", GAME, {"extract": "boxed"}, r"\boxed{3 \times 5 + 7}", 1.0),
        ("countdown", GAME, {"extract": "tag", "partial": 0.1}, "<answer>3*5+7</answer>", 1.0),
        ("countdown", GAME, {"extract": "tag", "partial": 0.1}, "<answer>3+5+7</answer>", 0.1),
        ("countdown", GAME, {"extract": "tag", "partial": 0.1}, "<answer>oops</answer>", 0.1),
        ("countdown", GAME, {"extract": "tag", "partial": 0.1}, "3*5+7", 0.0),
        ("countdown", GAME, {"partial": 0.1}, " ", 0.0),
        ("sudoku", {"clues": "1_3_____________"}, {"extract": "tag"}, "<answer>1234\n3412\n2143\n4321</answer>", 1.0),
        ("sudoku", {"clues": "1034000000000000"}, {"extract": "tag"}, "<answer>1234341221434321</answer>", 1.0),
        ("sudoku", {"clues": "123434122143432_"}, {"partial": True}, "1234341221434321", 1.0),
        ("sudoku", {"clues": "123434122143____"}, {"partial": True}, "1234341221434312", 0.5),
        ("sudoku", {"clues": "1234341221434___"}, {"partial": True, "extract": "tag"}, "<answer>1234341221434</answer>", 0.0),
        ("sudoku", {"clues": "123434122143____"}, {"partial": True, "extract": "tag"}, "<answer>12343412214343</answer>", 0.5),
        ("sudoku", {"clues": "123434122143____"}, {"partial": True, "extract": "tag"}, "1234341221434321", 0.0),
        ("sudoku", {"clues": "0" * 16, "solution": "1234341221434321"}, {"partial": True}, "1" * 16, 0.25),
        ("sudoku", {"clues": "_" * 16}, {"partial": True}, "1234341221434321", 1.0),
        ("format", {}, {}, r"so \boxed{5}", 1.0), ("format", {}, {}, r"so \boxed{}", 0.0), ("format", {}, {}, "so 5", 0.0),
        ("format", {}, {"pattern": "answer_tag"}, "x <answer>5</answer>\n", 1.0),
        ("format", {}, {"pattern": "answer_tag"}, "x <answer>5</answer> y", 0.0),
        ("format", {}, {"pattern": "think_answer"}, "<think>\nhm\n</think>\n<answer>5</answer>", 1.0),
        ("format", {}, {"pattern": "think_answer"}, "<think>a</think><think>b</think><answer>5</answer>", 0.0),
        ("format", {}, {"pattern": "think_answer"}, "<answer>5</answer>", 0.0),
        ("format", {}, {"pattern": "reasoning_answer"}, "<reasoning>a</reasoning> <answer>5</answer>", 1.0),
        ("format", {}, {"pattern": r"\d+"}, "123", 1.0), ("format", {}, {"pattern": r"\d+"}, "123 ", 0.0),
        ("length", {}, {"limit": 10, "buffer": 4}, "123456", 0.0), ("length", {}, {"limit": 10, "buffer": 4}, "12345678", -0.5),
        ("length", {}, {"limit": 10, "buffer": 4}, "x" * 10, -1.0), ("length", {}, {"limit": 10, "buffer": 4}, "x" * 99, -1.0),
    ],
)  # fmt: skip
def test_options(name, answer, options, response, reward):
    assert score(load_verifier(name, options), prompt(**answer), response)["reward"] == pytest.approx(reward)


def test_partial_credit_is_not_accuracy():
    verdict = score(
        load_verifier("countdown", {"extract": "tag", "partial": 0.1}), prompt(numbers=[1, 2], target=3), "<answer>1</answer>"
    )
    assert verdict == {"reward": 0.1, "correct": 0.0} and correctness(verdict) == 0.0 and correctness({"reward": 0.5}) == 0.5


def test_lengths_can_be_in_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    verdict = score(load_verifier("length", {"limit": 4, "buffer": 2, "tokenizer": str(tmp_path)}), prompt(), "a bbbbbb a")
    assert verdict == {"reward": -0.5, "size": 3.0}
    with pytest.raises(ConfigError, match="nowhere"):
        score(load_verifier("length", {"tokenizer": "nowhere"}), prompt(), "")


def test_parts_are_weighed_and_logged_apart():
    made = scorer(parts={"exact": 1.0, "format": 0.25, OWN: -0.5}, options={"format": {"pattern": r"\w+"}})
    verdict = made.score(prompt(answer="12x4"), "12x4")
    assert verdict == {
        "reward": 1.0 + 0.25 - 0.5, "correct": 1.0, "exact": 1.0, "format": 1.0, "share": 1.0, "share_digits": 0.75,
    }  # fmt: skip
    wrong = made.score(prompt(answer="1"), "12x4")
    assert wrong["reward"] == -0.25 and correctness(wrong) == 0.0 and str(made).startswith("1 exact + 0.25 format + -0.5 ")


def test_the_first_part_says_what_is_correct():
    made = scorer("countdown", parts={"task": 1.0, "format": 1.0}, options={"extract": "tag", "pattern": ".*", "partial": 0.1})
    verdict = made.score(prompt(numbers=[1, 2], target=3), "<answer>2-1</answer>")
    assert verdict == {"reward": 1.1, "correct": 0.0, "task": 0.1, "task_correct": 0.0, "format": 1.0}


def test_prompts_can_bring_their_own_verifier():
    made = scorer("exact")
    assert list(made.loaded) == ["exact"]
    assert made.score(prompt(answer="5"), "5") == {"reward": 1.0}
    assert made.score(prompt(verifier="countdown", numbers=[1, 2], target=3), "1+2") == {"reward": 1.0}
    assert list(made.loaded) == ["exact", "countdown"], "loaded when it is needed"
    both = scorer("exact", parts={"task": 1.0, "format": 0.5}, options={"pattern": r"[12+]*"})
    assert both.score(prompt(verifier="countdown", numbers=[1, 2], target=3), "1+2")["reward"] == 1.5
    with pytest.raises(ConfigError, match="did you mean exact"):
        made.score(prompt(verifier="exakt"), "")


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(parts={"mth": 1.0}), "did you mean math"),
        (dict(options={"extrct": "tag"}), "exact have no such option; did you mean extract"),
        (dict(options={"exact": {"extrct": "tag"}}), "extrct: verifier exact has no such option; did you mean extract"),
        (dict(parts={"exact": 1.0, OWN: 1.0}, options={OWN: {"x": 1}}), "share has no such option; it has none"),
        (dict(parts={OWN: 1.0, OWN.replace("tests/", "tests/./"): 1.0}), "logged as share, which is taken"),
        (dict(parts={"exact": 0.0}), "not all 0"),
        (dict(parts={"exact": float("nan")}), "finite"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        scorer(**settings)


def test_wrong_patterns_are_refused():
    for pattern, message in (("thnk_answer", "did you mean think_answer"), ("(", "no regular expression")):
        with pytest.raises(ConfigError, match=message):
            score(load_verifier("format", {"pattern": pattern}), prompt(), "")


def test_verifiers_with_options_travel():
    made = pickle.loads(pickle.dumps(load_verifier("exact", {"extract": "tag"})))
    assert made(prompt(answer="5"), "<answer>5</answer>") == 1.0
    assert "extract" in options_of(load_verifier("math")) and not options_of(load_verifier(OWN))


class Source:
    """Its first prompt is sound, its second is what the test says."""

    def __init__(self, verifier, sound, *others, size=None):
        self.verifier, self.prompts, self.size = verifier, [sound, *others], size

    def prompt(self, index):
        return self.prompts[index % len(self.prompts)]

    def test_prompts(self, count):
        return self.prompts[:count]


@pytest.mark.parametrize(
    "verifier, good, bad, message",
    [
        ("exact", {"answer": "5"}, {"answer": " "}, "no text under 'answer'"),
        ("exact", {"answer": "5"}, {}, "no text under 'answer'"),
        ("countdown", {"numbers": [1], "target": 1}, {"numbers": [1], "target": "1"}, "target='1'"),
        ("countdown", {"numbers": [1], "target": 1}, {"target": 1}, "numbers=None"),
        ("sudoku", {"clues": "_" * 16}, {"clues": "11" + "_" * 14}, "no grid keeps them"),
        ("sudoku", {"clues": "_" * 16}, {"clues": "1"}, "16 cells"),
        ("math", {"answer": "5"}, {"answer": ""}, "it is empty"),
        ("math", {"answer": "5"}, {"answer": r"\boxed{}"}, "it is empty"),
        ("math", {"answer": "5"}, {"answer": "so " * 400}, "1199 characters; give the final answer alone"),
        ("math", {"answer": "x^2"}, {}, "KeyError"),
        (
            "reasoning_gym",
            {"dataset": "chain_sum", "entry": "{'answer': '1'}"},
            {"dataset": "chain_sum", "entry": "{"},
            "SyntaxError",
        ),
        (
            "reasoning_gym",
            {"dataset": "chain_sum", "entry": "{'answer': '1'}"},
            {"dataset": "chian_sum", "entry": "{}"},
            "chian_sum",
        ),
    ],
)
def test_answers_that_nobody_can_read_are_found_before_the_start(verifier, good, bad, message):
    if verifier == "math":
        pytest.importorskip("math_verify")
    assert check_answers(Source(verifier, prompt(**good)), VerifierConfig(), 3) == 4
    with pytest.raises(DataError, match=f"data/7: verifier {verifier} cannot read .*{message}"):
        check_answers(Source(verifier, prompt(**good), prompt("data/7", **bad), size=2), VerifierConfig())


def test_options_are_tried_before_the_start():
    source = Source("exact", prompt(answer="5"))
    for settings, message in (
        (dict(options={"extract": "boxd"}), "did you mean boxed"),
        (dict(options={"extract": 3}), "takes str here"),
        (dict(parts={"task": 1.0, "format": 1.0}, options={"pattern": "("}), "no regular expression"),
        (dict(parts={"task": 1.0, "length": 1.0}, options={"limit": 4}), "buffer=512"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_answers(source, VerifierConfig(**settings))


def test_the_check_follows_prompts_and_parts():
    broken = prompt("data/7", verifier="sudoku", clues="1")
    with pytest.raises(DataError, match="data/7: verifier sudoku"):
        check_answers(Source("exact", prompt(answer="5"), broken), VerifierConfig())
    assert check_answers(Source("exact", broken), VerifierConfig(parts={OWN: 1.0, "format": 1.0}), 1) == 2


@dataclass
class Threshold:
    """A verifier that is an object with settings."""

    least: int = 3
    _calls: int = 0

    def __call__(self, prompt, response):
        return float(len(response) >= self.least)


LONG_ENOUGH = Threshold()


def test_a_verifier_can_be_an_object_with_settings():
    name = f"{__name__}:LONG_ENOUGH"
    assert options_of(LONG_ENOUGH) == {"least": 3}
    assert score(load_verifier(name, {"least": 5}), prompt(), "abcd") == {"reward": 0.0}
    assert score(load_verifier(name), prompt(), "abcd") == {"reward": 1.0}
    with pytest.raises(ConfigError, match="did you mean least"):
        load_verifier(name, {"last": 5})


def test_a_new_verifier_is_short(tmp_path):
    """The example of the documentation, and a whole built-in one."""
    example = (Path(__file__).parent.parent / "docs" / "verifiers.md").read_text(encoding="utf8").split("```python\n")[1]
    path = tmp_path / "my_reward.py"
    path.write_text(example.partition("```")[0], encoding="utf8")
    for file in (path, Path(load_verifier("exact").__code__.co_filename)):
        assert len(file.read_text(encoding="utf8").splitlines()) <= 20
    verdict = score(load_verifier(f"{path}:brief", {"words": 2}), prompt(answer="5"), r"so it is \boxed{5}")
    assert verdict == {"reward": 0.5, "correct": 1.0, "words": 4.0} and "exact" in BUILT_IN
