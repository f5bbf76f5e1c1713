"""Recipes of published methods: the models, data, prompts and rewards that the publications name, and their plans."""

import csv
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from published_configs import DREAM_7B, LLADA_8B, SDAR_4B
from test_recipes_published import PUBLISHED, load, spec_of

from rlpipe.data.record_tasks import places
from rlpipe.data.registry import build_source
from rlpipe.data.templates import resolve
from rlpipe.model_shapes import PUBLISHED as KNOWN_MODELS
from rlpipe.models.families import find_family
from rlpipe.run import main
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.checking import check_answers
from rlpipe.verifiers.scorer import Scorer

ROOT = Path(__file__).resolve().parent.parent
SDAR_4B_CHAT, LLADA = "JetLM/SDAR-4B-Chat", "GSAI-ML/LLaDA-8B-Instruct"
MATH, MATH500 = "Gen-Verse/MATH_train", "HuggingFaceH4/MATH-500"
COUNTDOWN = "Jiayi-Pan/Countdown-Tasks-3to4"
SDAR_TAIL = "<|im_end|>\n<|im_start|>assistant\n"
SDAR_ASKS = f"<|im_start|>user\n?\nPlease reason step by step, and put your final answer within \\boxed{{}}.{SDAR_TAIL}"
LLADA_HEAD = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n"
LLADA_TAIL = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
# model, training data, test data, most tokens of a prompt (0: no limit), the words around a problem as published ("": ours)
MEANS = {
    "tracerl_math": (SDAR_4B_CHAT, MATH, MATH500, 784, SDAR_ASKS),
    "tracerl_math_value": (SDAR_4B_CHAT, MATH, MATH500, 784, SDAR_ASKS),
    "tracerl_sdar_1.7b": ("JetLM/SDAR-1.7B-Chat", MATH, MATH500, 784, SDAR_ASKS),
    "tracerl_code": (
        SDAR_4B_CHAT, "Gen-Verse/PrimeIntellect", "Gen-Verse/LiveCodeBench", 784,
        "<|im_start|>user\n?\nPlace your code within a single Python code block ```python ```. Do not include more than one "
        f"code block. {SDAR_TAIL}",
    ),
    "tracerl_llada_math": (
        LLADA, MATH, MATH500, 512,
        "<|startoftext|><|start_header_id|>user<|end_header_id|>You need to put your final answer in \\boxed{}. This is the "
        "problem:\n?<|eot_id|><|startoftext|><|start_header_id|>assistant<|end_header_id|>\n",
    ),
    "mdpo_math": (
        LLADA, "data/openr1_backslide.jsonl", MATH500, 320,
        f"{LLADA_HEAD}?\nLet's think step by step and output the final answer within \\boxed{{}}.{LLADA_TAIL}",
    ),
    "mdpo_countdown": (LLADA, COUNTDOWN, "held_out", 320, ""),
    "cj_grpo_sudoku": (LLADA, "data/4x4_sudoku_unique_puzzles.csv", "data/4x4_test_sudoku.csv", 200, ""),
    "cj_grpo_math": (LLADA, "ankner/math-500", MATH500, 200, ""),
    "coupled_grpo_code": (
        "apple/DiffuCoder-7B-Instruct", "data/acecode_hard.jsonl", "evalplus/humanevalplus", 200,
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "just_grpo_gsm8k": (LLADA, "openai/gsm8k", "openai/gsm8k", 0, f"{LLADA_HEAD}?{LLADA_TAIL}"),
    "espo_countdown": (LLADA, "data/countdown3.jsonl", "held_out", 400, ""),
}  # fmt: skip
CONFIGS = {SDAR_4B_CHAT: SDAR_4B, "JetLM/SDAR-1.7B-Chat": SDAR_4B, LLADA: LLADA_8B, "apple/DiffuCoder-7B-Instruct": DREAM_7B}
EVERY = pytest.mark.parametrize("name", MEANS)


def docs_row(name: str) -> str:
    """What docs/recipes.md says of a recipe, first."""
    lines = (ROOT / "docs/recipes.md").read_text(encoding="utf8").splitlines()
    return next(line for line in lines if line.startswith(f"| `{name}` | "))


def test_the_table_holds_every_published_recipe():
    assert sorted(MEANS) == sorted(PUBLISHED)


@EVERY
def test_models_data_and_limits_are_the_published_ones(name):
    cfg, (model, train, test, limit, _) = load(name), MEANS[name]
    assert cfg.model.path == model and cfg.model.family == "" and cfg.data.max_prompt_tokens == limit
    assert [place.partition(",")[0] for place in places(cfg.data)] == [train, test]
    assert model in docs_row(name) and KNOWN_MODELS[model].block == spec_of(name).block_size


@EVERY
def test_families_are_recognised_by_config_json(name):
    config, spec = CONFIGS[load(name).model.path], spec_of(name)
    found = find_family(config).spec(config)
    assert (found.attention, found.block_size, found.logit_shift) == (spec.attention, spec.block_size, spec.logit_shift)


@EVERY
def test_a_dry_run_plans_without_a_network(name, capsys, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a dry run reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert main([f"recipe={name}", "dry_run=true", "cluster.address=local"]) == 0
    shown = capsys.readouterr().out
    model, train, test, *_ = MEANS[name]
    for part in (f"name: {name}", "placement", "one step", "not here", f"the model: {model} (of about ", "fits GPUs of"):
        assert part in shown
    for place in {train, test} - {"held_out"}:
        assert re.search(f"the data: .*{re.escape(place)}.*(will be downloaded|data\\.)", shown)
    assert "the verifier: " not in shown and "unknown" not in shown[shown.index("placement") :]


@EVERY
def test_prompts_are_worded_as_published(name):
    template, words = resolve(load(name).data.template), MEANS[name][4]
    asked = template.render(Prompt(uid="", task="", text="?", answer={}))
    assert asked == words or not words and asked.startswith(LLADA_HEAD) and asked.endswith(LLADA_TAIL) and asked.count("?") == 1
    assert words or re.search(r"</answer>|boxed\{\}", asked)
    assert all("@" in part for part in template.name.split(":")[: 1 + bool(words)]), "a version is said"


def test_programs_are_asked_for_as_published():
    prompt = Prompt(uid="", task="", text="?", answer={"tests": {"kind": "stdio"}})
    assert resolve(load("tracerl_code").data.template).render(prompt) == (
        "<|im_start|>user\nThis is the problem:\n?\nYou should put your code in ```python ```. Use input() to read input and "
        "print() to produce output in your script. <|im_end|>\n<|im_start|>assistant\n"
    )


PROBLEM = {"problem": "What is 1 + 1?", "solution": "It is \\boxed{2}.", "answer": "2", "unique_id": "test/algebra/1.json"}
OTHER = PROBLEM | {"problem": "What is 2 + 1?", "answer": "3", "solution": "\\boxed{3}", "unique_id": "test/algebra/2.json"}
ASSERTS = {"question": "Add.", "test_method": "function", "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]}
STDIO = {"question": "Echo.", "test_method": "stdio", "test_input": ["a\n", "b\n"], "test_output": ["a\na\n", "b\nb\n"]}
TIMED = {"prefix": "", "test_time_limit": 10}
HUMAN_EVAL = {
    "task_id": "HumanEval/0", "prompt": 'def twice(x):\n    """Double x."""\n', "entry_point": "twice",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n", "canonical_solution": "    return 2 * x\n",
}  # fmt: skip
SUMS = [{"nums": [1, 2, n], "target": 3 + n} for n in range(3, 40)]
GRID = {"Puzzle": "0234341221434320", "Solution": "1234341221434321"}
GRIDS = [GRID, GRID | {"Puzzle": "1034341221434321"}]
GOOD_CODE = "```python\ndef add(a, b):\n    return a + b\n```"
HALF_CODE = "```python\ndef add(a, b):\n    return 3\n```"
# records as the named data have them (training, test), and what responses to the first training prompt earn
RECORDS = {
    "tracerl_math": (
        [{"question": "What is 5 + 2?", "ground_truth_answer": "7"}], [PROBLEM],
        {"So \\boxed{7}.": 1.0, "\\boxed{7} or \\boxed{8}": 0.0, "7": 0.0},
    ),
    "tracerl_code": (
        [STDIO | TIMED], [ASSERTS | TIMED],
        {"```python\nx = input()\nprint(x)\nprint(x)\n```": 1.0, "```python\nprint('a')\nprint('a')\n```": 0.5},
    ),
    "mdpo_math": ([OTHER], [PROBLEM], {"So \\boxed{3}.": 1.0, "So \\boxed{4}.": 0.0}),
    "mdpo_countdown": (SUMS, None, {"so \\boxed{%s}": 1.0, "<answer>%s</answer>": 1.0, "%s": 1.0, "\\boxed{1+2}": 0.0}),
    "cj_grpo_sudoku": (
        GRIDS[:1], GRIDS[1:],
        {f"<answer>\n{GRID['Solution']}\n</answer>": 1.0, "<answer>1234341221434322</answer>": 0.5, GRID["Solution"]: 0.0},
    ),
    "cj_grpo_math": (
        [OTHER], [PROBLEM],
        {"<answer>\\boxed{3}</answer>": 2.5, "\\boxed{3}": 2.0, "<answer>\\boxed{4}</answer>": 0.5, "<answer>3": 0.5, "3": 0.0},
    ),
    "coupled_grpo_code": (
        [ASSERTS | {"prefix": ""}], [HUMAN_EVAL],
        {GOOD_CODE: 2.5, f"{GOOD_CODE}\nThat is it.": 2.0, HALF_CODE: 1.5, "```python\ndef (\n```": 0.5, "no": 0.0},
    ),
    "just_grpo_gsm8k": (
        [{"question": "What is 999 + 1?", "answer": "999 + 1 = 1000\n#### 1,000"}], [{"question": "1?", "answer": "#### 1"}],
        {"The answer is 1000.": 1.0, "\\boxed{1,000}": 1.0, "The answer is 100.": 0.0},
    ),
    "espo_countdown": (
        SUMS, None,
        {"<answer>%s</answer>": 1.0, "<answer>1+2</answer>": 0.1, "<answer>%s=6</answer>": 0.1, "%s": 0.0},
    ),
}  # fmt: skip
RECORDS["tracerl_llada_math"] = RECORDS["tracerl_sdar_1.7b"] = RECORDS["tracerl_math_value"] = RECORDS["tracerl_math"]


def write(path: Path, records: list[dict]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@EVERY
def test_records_of_the_named_data_are_read_and_judged(name, tmp_path):
    train, test, rewards = RECORDS[name]
    suffix = Path(MEANS[name][1]).suffix or ".jsonl"
    files = [f"data.train={write(tmp_path / f'train{suffix}', train)}"]
    files += [f"data.test={write(tmp_path / f'test{suffix}', test)}"] if test else []
    cfg = load(name, *files, "data.max_prompt_tokens=0")
    source = build_source(cfg.data, cfg.seed)
    prompt = source.prompt(0)
    assert source.test_prompts(1) and check_answers(source, cfg.verifier, 4) >= 2
    solution = "+".join(map(str, prompt.answer["numbers"])) if "numbers" in prompt.answer else ""
    scorer = Scorer(cfg.verifier, source.verifier)
    try:
        for response, reward in rewards.items():
            assert scorer.score(prompt, response.replace("%s", solution))["reward"] == pytest.approx(reward), response
    finally:
        scorer.release()


def commands() -> list[str]:
    """The Python programs that docs/recipes.md gives for making files."""
    return re.findall(r"python -c '\n(.*?)'", (ROOT / "docs/recipes.md").read_text(encoding="utf8"), flags=re.DOTALL)


def made(program: str, given: str, folder: Path) -> str:
    run = subprocess.run([sys.executable, "-c", program], input=given, capture_output=True, text=True, cwd=folder, check=True)
    return run.stdout


def test_files_are_made_as_the_list_of_recipes_says(tmp_path):
    backslide, countdown, acecode = commands()
    listed = ',Problem,Solution\n0,"Let it be.\n\nLet x = 1 + 1.\nLet\'s think step by step.",2\n'
    assert json.loads(made(backslide, listed, tmp_path)) == {"problem": "Let it be.\n\nLet x = 1 + 1.", "answer": "2"}
    hard = [
        {"id": "a", "question": "Add.", "test_cases": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]},
        {"id": "b", "question": "Complete:\n```\ndef add(a, b):\n```\n", "test_cases": ["assert add(1, 2) == 3"]},
    ]
    lines = made(acecode, "".join(json.dumps(record) + "\n" for record in hard), tmp_path).splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    write(tmp_path / "test.jsonl", [HUMAN_EVAL])
    files = [f"data.{part}={tmp_path / part}.jsonl" for part in ("train", "test")]
    source = build_source(load("coupled_grpo_code", *files, "data.max_prompt_tokens=0").data, 0)
    asked = {source.prompt(i).text.rpartition("user\n")[2].partition("<|im_end|>")[0] for i in range(2)}
    assert asked == {"Add.\nTest cases: assert add(1, 2) == 3", hard[1]["question"]}
    stub = "import datasets\ndatasets.load_dataset = lambda name, split: datasets.Dataset.from_list(PUZZLES)\n"
    puzzles = [{"nums": [1, 2, 3], "target": 6}, {"nums": [1, 2, 3, 4], "target": 10}]
    (tmp_path / "data").mkdir()
    made(stub.replace("PUZZLES", repr(puzzles)) + countdown, "", tmp_path)
    assert [json.loads(line) for line in (tmp_path / "data/countdown3.jsonl").read_text().splitlines()] == puzzles[:1]
