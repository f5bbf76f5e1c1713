"""Demonstrations and recordings as trajectories: tokens, grid, held-out ones, order, resumption, every bad line."""

import json

import numpy as np
import pytest
from test_learner_samples import groups_of
from tiny_models import ALPHABET, tiny

from rlpipe.data.source import PromptSource, held_out
from rlpipe.errors import CheckpointError, DataError
from rlpipe.sft.examples import Demonstrations, Recordings, as_trajectory
from rlpipe.sft.recordings import read_recordings
from rlpipe.trajectory import Prompt, Trajectories, replace


class Copy(PromptSource):
    """Repeat two digits; test prompts come with or without demonstrations."""

    task, verifier, alphabet = "copy", "exact", ALPHABET

    def __init__(self, different: int = 40, tests: bool = False, size: int | None = None):
        self.different, self.tests, self.size = different, tests, size
        self.identity = f"copy({different})"

    def prompt(self, index: int) -> Prompt:
        text = f"{index % self.different:02d}"
        return Prompt(uid=f"copy/{index}", task="copy", text=text)

    def test_prompts(self, count: int) -> list[Prompt]:
        shown = [f"{100 + i}" for i in range(count)]
        return [Prompt(uid=f"t{t}", task="copy", text=t, demonstration=t if self.tests else None) for t in shown]

    def demonstration(self, index: int) -> Prompt:
        prompt = self.prompt(index)
        return Prompt(uid=prompt.uid, task="copy", text=prompt.text, demonstration=prompt.text * 2)


def demonstrations(source: PromptSource, kind: str = "block", hold_out: int = 5) -> Demonstrations:
    size = tiny(kind)[0].spec.block_size
    return Demonstrations(source, tiny(kind)[1], max_tokens=8, block_size=size, hold_out=hold_out)


def texts(records) -> list[str]:
    return [tiny("block")[1].decode(record.prompt_ids.tolist()) for record in records]


@pytest.mark.parametrize("kind, length", [("block", 6), ("full", 8)])
def test_a_demonstration_is_a_trajectory_whose_eos_tail_counts(kind, length):
    model, tokenizer = tiny(kind)
    prompt = Prompt(uid="u", task="t", text="12", demonstration="345")
    record = as_trajectory(tokenizer, prompt, max_tokens=8, block_size=model.spec.block_size)
    assert record.response_ids.tolist() == [*tokenizer("345")["input_ids"], *[tokenizer.eos_token_id] * (length - 3)]
    assert record.loss_mask().all() and record.step_map().tolist() == list(range(1, length + 1))
    assert len(record.versions) == (2 if kind == "block" else 1)


def test_a_block_size_of_a_prompt_is_the_decoders_or_refused():
    prompt = Prompt(uid="u", task="t", text="12", demonstration="345", block_size=8)
    assert as_trajectory(tiny("full")[1], prompt, max_tokens=8, block_size=0).decoder == {"block_size": 8}
    with pytest.raises(DataError, match="asks for blocks of 8, but the model attends in blocks of 4"):
        as_trajectory(tiny("block")[1], prompt, max_tokens=8, block_size=4)


def test_the_first_demonstrations_are_held_out_where_tests_have_none():
    examples = demonstrations(Copy())
    assert texts(examples.held_out) == ["00", "01", "02", "03", "04"]
    given = texts(examples.take(80))
    assert given[:3] == ["05", "06", "07"] and not {"00", "01", "02", "03", "04"} & set(given)
    with pytest.raises(DataError, match="held-out examples only"):
        demonstrations(Copy(different=4), hold_out=4).take(1)


def test_tests_with_demonstrations_are_the_held_out_ones():
    examples = demonstrations(Copy(tests=True))
    assert texts(examples.held_out) == ["100", "101", "102", "103", "104"] and texts(examples.take(1)) == ["00"]
    assert demonstrations(Copy(), hold_out=0).held_out == []


def test_the_place_in_the_data_is_a_number():
    first, second = demonstrations(Copy()), demonstrations(Copy())
    first.take(17)
    second.restore(json.loads(json.dumps(first.state())))
    assert texts(first.take(9)) == texts(second.take(9))
    with pytest.raises(CheckpointError, match="copy"):
        demonstrations(Copy(different=30)).restore(first.state())


def recorded(kind: str, count: int = 24):
    """Trajectories of a tiny model, two to a prompt."""
    return [replace(r, uid=f"p{i // 2}", sample=i % 2) for i, r in enumerate(groups_of(kind, count, 2)[1])]


def test_recordings_survive_a_file_and_come_in_a_fresh_order_every_pass(tmp_path):
    records = recorded("block")
    Trajectories.of(records[:10]).save(tmp_path / "a.npz")
    Trajectories.of(records[10:]).save(tmp_path / "b.npz")
    read = read_recordings(tmp_path, tiny("block")[1], 4)
    assert [r.uid for r in read] == [r.uid for r in records]
    examples = Recordings(read, "a.npz", 0, block_size=4, hold_out=4)
    out = {r.uid for r in examples.held_out}
    assert out and all(held_out(uid) for uid in out)
    passes = [[(r.uid, r.sample) for r in examples.take(examples.size)] for _ in range(2)]
    assert passes[0] != passes[1] and sorted(passes[0]) == sorted(passes[1]) and not out & {uid for uid, _ in passes[0]}
    other = Recordings(read, "a.npz", 0, block_size=4, hold_out=4)
    other.restore({"source": other.identity, "index": examples.size})
    assert [(r.uid, r.sample) for r in other.take(5)] == passes[1][:5]
    with pytest.raises(DataError, match="blocks of 4, and the model has full attention"):
        Recordings(read, "a.npz", 0, block_size=0, hold_out=0)


def test_a_line_gives_the_recorded_states_back(tmp_path):
    record, tokenizer = recorded("block", 2)[0], tiny("block")[1]
    line = {
        "prompt_ids": record.prompt_ids.tolist(),
        "response_ids": record.response_ids[: record.valid_len].tolist(),
        "step_map": record.step_map()[: record.valid_len].tolist(),
    }
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(line) + "\n\n" + json.dumps({"prompt": "12", "response": "34", "step_map": [7, 3, 9]}) + "\n")
    first, second = read_recordings(path, tokenizer, 4)
    np.testing.assert_array_equal(np.argsort(first.step_map()[: record.valid_len]), np.argsort(line["step_map"]))
    assert (first.prompt_len + first.response_len) % 4 == 0 and first.loss_mask().sum() == record.valid_len
    assert second.response_ids.tolist()[:3] == [*tokenizer("34")["input_ids"], tokenizer.eos_token_id]
    assert second.step_map().tolist()[:3] == [5, 1, 7] and second.loss_mask().tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", r"x.jsonl:2: not JSON"),
        ("[1]", r"x.jsonl:2: a list where an object"),
        ('{"prompt": "1", "response": "2"}', r"x.jsonl:2: field 'step_map'"),
        ('{"prompt": "", "response": "2", "step_map": [1]}', r"x.jsonl:2: field 'prompt'"),
        ('{"prompt": "1", "response": "23", "step_map": [1]}', r"x.jsonl:2: field 'step_map' has 1 steps for 2 tokens"),
        ('{"prompt_ids": [9999], "response_ids": [5], "step_map": [1]}', r"x.jsonl:2: field 'prompt_ids' has ids outside"),
        ('{"prompt": "1", "response_ids": ["a"], "step_map": [1]}', r"x.jsonl:2: field 'response_ids' must be a list of whole"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, match):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "1", "response": "2", "step_map": [1]}\n' + line + "\n")
    with pytest.raises(DataError, match=match):
        read_recordings(path, tiny("block")[1], 4)


def test_bad_files_are_named(tmp_path):
    for name, content in (("a.txt", "x"), ("b.npz", "x"), ("c.jsonl", "\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=name):
            read_recordings(tmp_path / name, tiny("block")[1], 4)
    with pytest.raises(DataError, match="nowhere"):
        read_recordings(tmp_path / "nowhere.npz", tiny("block")[1], 4)
