"""Demonstrations and recordings as trajectories: tokens, grid, held-out ones, order, resumption, every bad line."""

import json

import numpy as np
import pytest
from test_learner_samples import groups_of
from tiny_models import ALPHABET, tiny

from rlpipe.data.report import DEMONSTRATION
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
    with pytest.raises(DataError, match="4 held out: there are none but those; lower sft.held_out"):
        demonstrations(Copy(different=4), hold_out=4).take(1)


class Uneven(Copy):
    """Some demonstrations are missing, some too long, one for another grid."""

    def demonstration(self, index: int) -> Prompt:
        prompt = super().demonstration(index)
        if index % 10 == 3:
            raise DataError(f"line {index}: no field 'demonstration'")
        longer = prompt.text * 3 if index % 10 == 7 else prompt.demonstration
        return Prompt(uid=prompt.uid, task="copy", text=prompt.text, demonstration=longer, block_size=8 * (index == 11))


def test_demonstrations_that_cannot_be_used_are_found_before_anything_starts():
    with pytest.raises(DataError, match="line 3: no field 'demonstration'; data.bad_records=skip leaves such ones out"):
        demonstrations(Uneven(size=40), hold_out=0)
    with pytest.raises(DataError, match="copy/7 has 6 tokens.*rollout.decoder.max_tokens"):
        as_trajectory(tiny("block")[1], Uneven().demonstration(7), max_tokens=5, block_size=4)
    demonstrations(Uneven(), hold_out=0)  # without an end nobody can look at all of them


def test_demonstrations_that_cannot_be_used_are_left_out_and_counted_if_asked():
    def made(source, hold_out=0):
        return Demonstrations(source, tiny("block")[1], max_tokens=5, block_size=4, hold_out=hold_out, skip_bad=True)

    examples = made(Uneven(size=40))
    (report,) = examples.reports
    assert report.dropped == {DEMONSTRATION: 9} and (report.read, report.used, examples.size) == (40, 31, 31)
    assert "copy/11 asks for blocks of 8" in str(report.listed) and "line 33: no field" in str(report.listed)
    given = texts(examples.take(31))
    assert len(set(given)) == 31 and not {"03", "07", "11"} & set(given) and examples.left_out == 9
    endless = made(Uneven())
    assert texts(endless.take(31)) == given and endless.size is None and endless.left_out == 9
    assert texts(made(Uneven(size=40), 5).held_out) == ["00", "01", "02", "04", "05"]
    assert made(Uneven(size=40), 5).size == 26 and made(Copy(size=40), 5).size == 35


def test_a_pass_has_no_held_out_examples():
    with pytest.raises(DataError, match="of 40, 0 cannot be used and 40 are held out"):
        demonstrations(Copy(size=40), hold_out=64)
    assert demonstrations(Copy(size=40)).size == 35 and demonstrations(Copy(size=40, tests=True)).size == 40


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
    found = groups_of(kind, count, 2)[1]
    prompts = [np.full_like(found[i].prompt_ids, 4 + i // 2 % 19) for i in range(count)]
    return [replace(r, uid=f"p{i // 2}", sample=i % 2, prompt_ids=prompts[i]) for i, r in enumerate(found)]


def test_recordings_survive_a_file_and_come_in_a_fresh_order_every_pass(tmp_path):
    records = recorded("block")
    Trajectories.of(records[:10]).save(tmp_path / "a.npz")
    Trajectories.of(records[10:]).save(tmp_path / "b.npz")
    read = read_recordings(tmp_path, tiny("block")[1], 4)
    assert [r.uid for r in read] == [r.uid for r in records]
    examples = Recordings(read, "a.npz", 0, block_size=4, hold_out=4)
    out = {r.uid for r in examples.held_out}
    assert out and all(held_out(str(r.prompt_ids.tolist())) for r in examples.held_out)
    passes = [[(r.uid, r.sample) for r in examples.take(examples.size)] for _ in range(2)]
    assert passes[0] != passes[1] and sorted(passes[0]) == sorted(passes[1]) and not out & {uid for uid, _ in passes[0]}
    other = Recordings(read, "a.npz", 0, block_size=4, hold_out=4)
    other.restore({"source": other.identity, "index": examples.size})
    assert [(r.uid, r.sample) for r in other.take(5)] == passes[1][:5]
    with pytest.raises(DataError, match="blocks of 4, and the model has full attention"):
        Recordings(read, "a.npz", 0, block_size=0, hold_out=0)


def test_recordings_are_held_out_by_their_prompts_whatever_their_uids():
    records = [replace(r, uid=f"{i}") for i, r in enumerate(recorded("block") * 2)]
    for count in (1, 2, 4, 64):
        examples = Recordings(records, "a.npz", 0, block_size=4, hold_out=count)
        assert 0 < len(examples.held_out) <= count
        out = {r.prompt_ids.tobytes() for r in examples.held_out}
        assert examples.rows and not out & {r.prompt_ids.tobytes() for r in examples.rows}
    changed = [replace(r, response_ids=r.response_ids[::-1].copy()) for r in records]
    with pytest.raises(CheckpointError, match="recordings"):
        Recordings(changed, "a.npz", 0, block_size=4, hold_out=64).restore(examples.state())


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
        (
            '{"prompt": "1", "response": "2", "step_map": [99999999999]}',
            r"x.jsonl:2: field 'step_map' has a number of more than",
        ),
        ('{"prompt": "1", "response": "23", "step_map": [-2147483647, 2]}', r"x.jsonl:2: field 'step_map' spans more than"),
        ('{"prompt": "1", "step_map": [' + "1" * 5000 + "]}", r"x.jsonl:2: not usable JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, match):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "1", "response": "2", "step_map": [1]}\n' + line + "\n")
    with pytest.raises(DataError, match=match):
        read_recordings(path, tiny("block")[1], 4)


def test_bad_files_are_named(tmp_path):
    for name, content in (("a.txt", "x"), ("b.npz", "x"), ("c.jsonl", "\n"), ("d.npz", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=name):
            read_recordings(tmp_path / name, tiny("block")[1], 4)
    with pytest.raises(DataError, match="nowhere"):
        read_recordings(tmp_path / "nowhere.npz", tiny("block")[1], 4)
