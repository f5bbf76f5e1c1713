"""The folder of an evaluation: nothing is lost, nothing is mixed, order is restored."""

import dataclasses
import json

import pytest

from rlpipe.errors import CheckpointError, ConfigError
from rlpipe.eval.store import IDENTITY, SAMPLES, TIMES, Store
from rlpipe.evaluation.samples import Sample
from rlpipe.trajectory import Prompt

ONE = {"weights": {"blake2b": "aa"}, "seed": 1}
PROMPTS = [Prompt(uid=f"p{i}", task="t", text=f"text {i}", answer={"answer": i}) for i in range(3)]


def group(uid, count=2, parts=None):
    return [
        Sample(uid=uid, sample=i, text=f"{uid} \n\u2028\ud800 {i}", tokens=3, forwards=2, stop="eos", exact=True, parts=parts)
        for i in range(count)
    ]


def opened(folder, resume=True, identity=ONE, prompts=PROMPTS):
    return Store.open(folder, resume, identity, prompts)


def lines(folder, name=SAMPLES):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf8").splitlines()]


def test_responses_come_back_with_their_verdicts_and_any_text(tmp_path):
    store = opened(tmp_path / "e", resume=False)
    store.add("k", "name", [group("p0"), group("p1")])
    store.add("k", "name", [group("p0", parts={"reward": 1.0})])
    store.spend("k", 2, seconds=1.0, tokens=12)
    store.spend("k", 1, seconds=0.5)
    again = opened(tmp_path / "e")
    assert again.group("k", "p0", 2) == group("p0", parts={"reward": 1.0}) and again.group("k", "p1", 2) == group("p1")
    assert again.has("k", "p0", 2) and not again.has("k", "p0", 3) and not again.has("k", "p2", 1)
    assert again.spent == {"k": {"seconds": 1.5, "tokens": 12}} and again.workers == {"k": {1, 2}}
    assert len(lines(tmp_path / "e")) == 4, "a response has one line again"


def test_a_line_that_was_cut_off_is_drawn_again(tmp_path):
    store = opened(tmp_path)
    store.add("k", "name", [group("p0"), group("p1")])
    path = tmp_path / SAMPLES
    path.write_bytes(path.read_bytes()[:-20])
    with (tmp_path / TIMES).open("a") as file:
        file.write('{"key": "k", "wor')
    again = opened(tmp_path)
    assert again.has("k", "p0", 2) and not again.has("k", "p1", 2)
    again.add("k", "name", [group("p1")])
    assert opened(tmp_path).has("k", "p1", 2)


def test_a_damaged_line_further_up_is_named(tmp_path):
    store = opened(tmp_path)
    store.add("k", "name", [group("p0")])
    path = tmp_path / SAMPLES
    path.write_bytes(b"{]\n" + path.read_bytes())
    with pytest.raises(CheckpointError, match=f"{SAMPLES}:1: not JSON"):
        opened(tmp_path)


def test_other_settings_are_not_mixed_in(tmp_path):
    opened(tmp_path)
    with pytest.raises(ConfigError, match="another seed .1, now 2."):
        opened(tmp_path, identity=ONE | {"seed": 2})
    with pytest.raises(ConfigError, match="another weights"):
        opened(tmp_path, identity=ONE | {"weights": {"blake2b": "bb"}})
    changed = [dataclasses.replace(PROMPTS[0], text="another"), *PROMPTS[1:]]
    with pytest.raises(ConfigError, match="prompt p0 was another one"):
        opened(tmp_path, prompts=changed)
    opened(tmp_path, prompts=[*PROMPTS, Prompt(uid="p9", task="t", text="more")])
    assert len(lines(tmp_path, "prompts.jsonl")) == 4


def test_folders_that_are_taken(tmp_path):
    opened(tmp_path)
    with pytest.raises(ConfigError, match="resume=auto goes on"):
        opened(tmp_path, resume=False)
    (tmp_path / IDENTITY).unlink()
    with pytest.raises(ConfigError, match="holds something else"):
        opened(tmp_path, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="holds something else"):
        opened(tmp_path / "file")


def test_the_end_puts_everything_in_order_and_keeps_other_decoders(tmp_path):
    store = opened(tmp_path)
    store.add("other", "other", [group("p1")])
    for uid in ("p2", "p0", "p1"):
        store.add("b", "second", [group(uid)[::-1]])
        store.add("a", "first", [group(uid)])
    store.finish(["a", "b"], PROMPTS)
    order = [(line["decoder"], line["uid"], line["sample"]) for line in lines(tmp_path)]
    wanted = [(name, f"p{i}", n) for name in ("first", "second") for i in range(3) for n in range(2)]
    assert order == [*wanted, ("other", "p1", 0), ("other", "p1", 1)]
