"""Records in every shape and from every kind of file; what is wrong with one is said with its place and field."""

import base64
import json
import pickle
import zlib

import pytest

from rlpipe.config import DataConfig
from rlpipe.data.code_answers import verl
from rlpipe.data.files import Where
from rlpipe.data.records import RecordSource, read
from rlpipe.data.registry import build_source, check_block_sizes
from rlpipe.data.report import write
from rlpipe.data.shapes import SHAPES, Shape, lookup, recognise
from rlpipe.errors import ConfigError, DataError


def jsonl(path, *records):
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records), encoding="utf8")
    return str(path)


def source(tmp_path, *records, test=({"prompt": "held", "answer": "0"},), seed=0, model="", **settings):
    test = settings.pop("test_file", None) or jsonl(tmp_path / "test.jsonl", *test)
    train = settings.pop("train_file", None) or jsonl(tmp_path / "train.jsonl", *records)
    return build_source(DataConfig(**({"task": "records", "train": train, "test": test} | settings)), seed, model)


PRIVATE = base64.b64encode(
    zlib.compress(pickle.dumps(json.dumps([{"input": "[2]\n3", "output": "[2, 3]", "testtype": "functional"}])))
).decode()
METADATA = json.dumps({"func_name": "join"})
HUMAN_EVAL = {
    "task_id": "HumanEval/9", "prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": "    return x\n",
    "test": "def check(candidate):\n    assert candidate(1) == 1\n",
}  # fmt: skip
MBPP = {"task_id": 7, "text": "Add.", "code": "def add(a, b): …", "test_list": ["assert add(1, 2) == 3"], "test_setup_code": ""}
LCB = {"question_content": "Join.", "question_id": "q7", "starter_code": "", "metadata": "{}"}
JUDGED, STDIO = {"ground_truth": "1"}, {"question": "q", "test_method": "stdio"}
STDIN = json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}])
EXAMPLES = {  # a record as the data set has it → shape, text, answer, verifier
    "ours": ({"prompt": "1+1", "answer": 2}, "rlpipe", "1+1", {"answer": 2}, "exact"),
    "our tests": ({"prompt": "p", "answer": {"tests": {"a": 1}}}, "rlpipe", "p", {"tests": {"a": 1}}, "code"),
    "our judge": ({"prompt": "p", "answer": "a", "verifier": "math"}, "rlpipe", "p", {"answer": "a"}, "math"),
    "dllm_rl": ({"question": "q", "ground_truth_answer": "7"}, "dllm_rl", "q", {"answer": "7"}, "math"),
    "dllm_rl function": (
        {"question": "q", "test_method": "function", "test_list": ["assert f() == 1"], "prefix": "def f():\n",
         "test_time_limit": 2},
        "dllm_rl_code", "q\n\nBegin with:\n```python\ndef f():\n```",
        {"tests": {"kind": "asserts", "asserts": ["assert f() == 1"], "setup": "", "prefix": "def f():\n",
                   "time_limit_s": 2.0}},
        "code",
    ),
    "dllm_rl stdio": (
        {"question": "q", "test_method": "stdio", "test_input": ["1"], "test_output": ["2"]}, "dllm_rl_code", "q",
        {"tests": {"kind": "stdio", "inputs": ["1"], "outputs": ["2"]}}, "code",
    ),
    "verl": (
        {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"style": "rule", "ground_truth": "7"},
         "data_source": "openai/gsm8k", "extra_info": {"index": 3}},
        "verl", "q", {"answer": "7"}, "math",
    ),
    "verl code": (
        {"prompt": [{"role": "user", "content": "q"}],
         "reward_model": {"ground_truth": json.dumps({"inputs": ["1"], "outputs": ["2"]})}},
        "verl", "q", {"tests": {"kind": "stdio", "inputs": ["1"], "outputs": ["2"]}}, "code",
    ),
    "pairs": ({"prompt": "q", "response": "r<|im_end|>"}, "pairs", "q", {"answer": "r<|im_end|>"}, "exact"),
    "gsm8k": ({"question": "q", "answer": "3 eggs … \n#### 1,234"}, "gsm8k", "q", {"answer": "1234"}, "math"),
    "math": ({"problem": "q", "solution": "so \\boxed{\\frac{1}{2}}."}, "math", "q", {"answer": "\\frac{1}{2}"}, "math"),
    "math500": ({"problem": "q", "solution": "\\boxed{x}", "answer": "3"}, "math", "q", {"answer": "3"}, "math"),
    "aime": ({"problem": "q", "solution": None, "answer": "33", "id": 60}, "math", "q", {"answer": "33"}, "math"),
    "champ": ({"_text": "q", "_answer": "n/2", "identifier": "P_1"}, "champ", "q", {"answer": "n/2"}, "math"),
    "humaneval": (
        HUMAN_EVAL, "humaneval", "def f(x):\n",
        {"tests": {"kind": "check", "entry_point": "f", "check": HUMAN_EVAL["test"], "prefix": "def f(x):\n"}}, "code",
    ),
    "mbpp": (
        MBPP, "mbpp", "Add.\nYour code has to pass these tests:\nassert add(1, 2) == 3",
        {"tests": {"kind": "asserts", "asserts": ["assert add(1, 2) == 3"], "setup": "", "prefix": ""}}, "code",
    ),
    "mbpp plus": (
        {"task_id": 7, "prompt": "Add.", "code": "…", "test_list": ["assert add(1, 2) == 3"], "test_imports": [],
         "test": "assert 1"},
        "mbpp", "Add.\nYour code has to pass these tests:\nassert add(1, 2) == 3",
        {"tests": {"kind": "asserts", "asserts": ["assert 1"], "setup": "", "prefix": ""}}, "code",
    ),
    "acecode": (
        {"id": "a_1", "question": "Add.", "test_cases": ["assert add(1, 2) == 3", "assert 1"]}, "acecode",
        "Add.\nassert add(1, 2) == 3",
        {"tests": {"kind": "asserts", "asserts": ["assert add(1, 2) == 3", "assert 1"], "setup": "", "prefix": ""}}, "code",
    ),
    "livecodebench": (
        LCB | {"public_test_cases": STDIN, "private_test_cases": "[]"}, "livecodebench", "Join.",
        {"tests": {"kind": "stdio", "inputs": ["1\n"], "outputs": ["2\n"]}}, "code",
    ),
    "countdown": ({"nums": [3, 5], "target": 8}, "countdown", "3 5=8", {"numbers": [3, 5], "target": 8}, "countdown"),
    "sudoku": (
        {"Puzzle": "1234000000000000", "Solution": "1234341221434321"}, "sudoku", "1234____________",
        {"clues": "1234____________"}, "sudoku",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_shape_is_recognised_and_read(tmp_path, name):
    record, shape, text, answer, verifier = EXAMPLES[name]
    assert recognise(record) == shape
    for setting in ("auto", shape):
        found, report = read(Where.parse(jsonl(tmp_path / "a.jsonl", record), "data.train"), "records", setting, {})
        assert report.shape == shape and (report.read, report.used) == (1, 1)
        assert (found[0].text, found[0].answer, found[0].verifier) == (text, answer, verifier)
        json.dumps(found[0].answer)


def test_calls_of_packed_cases_become_a_check(tmp_path):
    starter = "class Solution:\n    def join(self, a, b):\n"
    record = LCB | {"public_test_cases": "[]", "private_test_cases": PRIVATE, "metadata": METADATA, "starter_code": starter}
    found = read(Where.parse(jsonl(tmp_path / "a.jsonl", record), "data.train"), "records", "auto", {})[0][0]
    tests = found.answer["tests"]
    assert tests["entry_point"] == "Solution" and "Begin with" in found.text and found.name == "q7"

    class Solution:
        def join(self, a, b):
            return (*a, b)

    space = {}
    exec(tests["check"], space)
    space["check"](Solution)
    with pytest.raises(AssertionError):
        space["check"](lambda: type("Wrong", (), {"join": lambda self, a, b: [b]})())


@pytest.mark.parametrize(
    "inputs, outputs, right, wrong",
    [
        (["[1, 2]\n3", "[]\n1"], ["6", "1"], lambda a, b: sum(a) + b, lambda a, b: b),  # texts, a JSON value a line
        ([[[1, 2], 3], [[], 1]], [6, 1], lambda a, b: sum(a) + b, lambda a, b: b),
        ([["ab"], ["c"]], [["ba"], ["c"]], lambda a: a[::-1], lambda a: a),  # results wrapped, as in APPS
        ([[2], [3]], [[2, 2], [3]], lambda n: [n] * (4 - n if n == 3 else 2), lambda n: n),  # results that are lists
    ],
)
def test_calls_of_verl_in_all_their_forms(inputs, outputs, right, wrong):
    truth = json.dumps({"fn_name": "f", "inputs": inputs, "outputs": outputs})
    space = {}
    exec(verl(truth, {})["tests"]["check"], space)
    space["check"](right)
    with pytest.raises(AssertionError):
        space["check"](wrong)


def test_lines_of_verl_are_a_text():
    tests = verl({"inputs": [["1", "2"], "3"], "outputs": [["a", "b"], "c"]}, {})["tests"]
    assert tests == {"kind": "stdio", "inputs": ["1\n2", "3"], "outputs": ["a\nb", "c"]}


def test_conversations_that_end_alike_are_different_prompts(tmp_path):
    def asked(system, answer):
        turns = [{"role": "system", "content": system}, {"role": "user", "content": "Go on."}]
        return {"prompt": turns, "answer": answer}

    held = [asked("one", "1"), asked("two", "2"), asked("one", "1")]
    found = read(Where.parse(jsonl(tmp_path / "a.jsonl", *held), "data.test"), "records", "auto", {})[0]
    train = read(
        Where.parse(jsonl(tmp_path / "b.jsonl", asked("two", "2"), asked("three", "3")), "data.train"), "r", "auto", {}
    )
    made = RecordSource("records", 0, train[0], found)
    assert [prompt.answer["answer"] for prompt in made.test_prompts(9)] == ["1", "2"]
    assert made.size == 1 and made.prompt(0).context[0][1] == "three"


def test_other_answers_are_another_source(tmp_path):
    def identity(**more):
        return source(tmp_path, {"prompt": "q", "answer": "1"} | more).identity

    assert len({identity(), identity(answer="2"), identity(demonstration="d"), identity(verifier="math")}) == 4


def test_demonstrations_uids_and_conversations(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    made = source(tmp_path, HUMAN_EVAL | {"block_size": 8}, test=(HUMAN_EVAL | {"prompt": "def g():\n"},))
    prompt = made.demonstration(0)
    assert prompt.demonstration == "    return x\n" and prompt.uid == "records/0/HumanEval/9" and prompt.block_size == 8
    pair = source(tmp_path, {"prompt": "q", "response": "r", "answer": "a"}).demonstration(0)
    assert (pair.demonstration, pair.answer) == ("r", {"answer": "a"})
    assert made.block_sizes == (8,) and made.verifier == "code" and prompt.verifier == "" and len(prompt.record) == 16
    path = jsonl(tmp_path / "chat.jsonl", {"prompt": turns, "answer": "a"}, {"prompt": "q", "answer": "a"})
    chat, plain = read(Where.parse(path, "data.train"), "records", "auto", {})[0]
    assert chat.context == (("system", "Be brief."),) and chat.text == plain.text == "q" and chat.key != plain.key
    with pytest.raises(DataError, match=r"chat.jsonl:1 has 1 turns before its last one, and data.template=\{prompt\}"):
        source(tmp_path, train_file=path)


def test_records_say_their_own_verifier_where_it_is_another(tmp_path):
    made = source(tmp_path, {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "1", "verifier": "math"})
    assert made.verifiers == ("exact", "math")
    assert {made.prompt(i).text: made.prompt(i).verifier for i in (0, 1)} == {"a": "", "b": "math"}


def test_fields_of_other_names(tmp_path):
    record = {"ask": {"text": "q"}, "key": "7", "size": 4, "gold": "because"}
    columns = {"prompt": "ask.text", "answer": "key", "block_size": "size", "demonstration": "gold"}
    held = record | {"ask": {"text": "h"}}
    prompt = source(tmp_path, record, test=(held,), options=columns).prompt(0)
    assert (prompt.text, prompt.answer, prompt.block_size, prompt.demonstration) == ("q", {"answer": "7"}, 4, "because")
    with pytest.raises(ConfigError, match="data.options.answr.*did you mean answer"):
        source(tmp_path, record, test=(held,), options={"answr": "key"})
    assert lookup({"a.b": 1, "a": {"b": 2}}, "a.b") == 1 and lookup({"a": {"b": 2}}, "a.b") == 2


def test_a_shape_of_the_users_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from rlpipe.data.shapes import Shape\n"
        "RIDDLE = Shape(text=('riddle',), answer=('key',), verifier='exact', marks={}, read_answer=lambda v, r: v.upper())\n"
    )
    record, held = {"riddle": "q", "key": "a"}, {"riddle": "h", "key": "b"}
    assert source(tmp_path, record, test=(held,), format=f"{file}:RIDDLE").prompt(0).answer == {"answer": "A"}
    with pytest.raises(ConfigError, match="no shape RIDLE; did you mean RIDDLE"):
        source(tmp_path, record, test=(held,), format=f"{file}:RIDLE")
    with pytest.raises(ConfigError, match="data.format=dllmrl.*did you mean dllm_rl"):
        source(tmp_path, record, test=(held,), format="dllmrl")
    assert isinstance(SHAPES["verl"], Shape)


@pytest.mark.parametrize(
    "shape, record, message",
    [
        ("gsm8k", {"question": "q", "answer": "forty-two"}, "field 'answer' has no ####"),
        ("math", {"problem": "q", "solution": "so 3"}, r"field 'solution' has no \\boxed"),
        ("math", {"problem": "q", "solution": "so \\boxed{3"}, "never closed"),
        ("math", {"question": "q"}, "no field 'problem'; it has question"),
        ("verl", {"prompt": [{"role": "assistant", "content": "a"}], "reward_model": JUDGED}, "the last message is the assist"),
        ("verl", {"prompt": [{"role": "user", "content": 3}], "reward_model": JUDGED}, "must be texts"),
        ("verl", {"prompt": [], "reward_model": JUDGED}, "field 'prompt' must be a text that is not empty"),
        ("verl", {"prompt": "q", "reward_model": {}}, "no field 'reward_model.ground_truth'"),
        ("dllm_rl_code", {"question": "q", "test_method": "magic"}, "field 'test_method' must be function or stdio"),
        ("dllm_rl_code", {"question": "q", "test_method": "function"}, "needs test_list as a list"),
        ("dllm_rl_code", STDIO | {"test_input": ["1"], "test_output": []}, "needs test_output"),
        ("dllm_rl_code", STDIO | {"test_input": ["1", "2"], "test_output": ["1"]}, "do not pair"),
        ("humaneval", HUMAN_EVAL | {"test": "assert True"}, r"field 'test' defines no check\(candidate\)"),
        ("humaneval", HUMAN_EVAL | {"entry_point": None}, "entry_point must be a text"),
        ("mbpp", MBPP | {"test_list": []}, "needs test_list"),
        ("livecodebench", LCB | {"public_test_cases": "[]"}, "not one test case"),
        ("livecodebench", LCB | {"public_test_cases": "nonsense"}, "neither JSON nor packed JSON"),
        ("livecodebench", LCB | {"public_test_cases": STDIN.replace("stdin", "magic")}, "stdin or functional"),
        ("livecodebench", LCB | {"public_test_cases": STDIN.replace("stdin", "functional")}, "no func_name"),
        ("countdown", {"nums": "3 5", "target": 8}, "field 'nums' must be a list of whole numbers"),
        ("sudoku", {"Puzzle": "12", "Solution": "12"}, "field 'Puzzle' must be 16 digits"),
        ("rlpipe", {"prompt": "q", "answer": "a", "block_size": "4"}, "field 'block_size' must be a whole number"),
        ("rlpipe", {"prompt": "q", "answer": "a", "block_size": -4}, "field 'block_size' must be a number of at least 1"),
        ("rlpipe", {"prompt": "q", "answer": "a", "verifier": 3}, "field 'verifier' must be a text"),
        ("rlpipe", {"prompt": "q", "answer": ""}, "field 'answer' must be a text, a number or an object that is not empty"),
        ("rlpipe", {"prompt": "q\ud800", "answer": "a"}, r"field 'prompt' holds half a character \(\\ud800\) at place 1"),
        ("rlpipe", {"prompt": "q", "answer": "a", "demonstration": "\udc00"}, "field 'demonstration' holds half a character"),
        ("verl", {"prompt": "q", "reward_model": {"ground_truth": {"inputs": ["1"], "outputs": []}}}, "do not pair up"),
        ("verl", {"prompt": "q", "reward_model": {"ground_truth": {"inputs": "1", "outputs": "2"}}}, "inputs that are no list"),
    ],
)
def test_bad_records_are_named_with_their_field(tmp_path, shape, record, message):
    path = jsonl(tmp_path / "bad.jsonl", record)
    with pytest.raises(DataError, match=rf"bad\.jsonl:1: .*{message}"):
        read(Where.parse(path, "data.train"), "records", shape, {})


def test_a_pickle_in_a_data_file_cannot_run_anything(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    path = jsonl(tmp_path / "bad.jsonl", LCB | {"public_test_cases": "[]", "private_test_cases": packed})
    with pytest.raises(DataError, match="private_test_cases is neither JSON nor packed JSON: it asks for"):
        read(Where.parse(path, "data.train"), "records", "auto", {})
    assert not (tmp_path / "owned").exists()


def test_bad_records_are_skipped_and_listed_only_if_asked(tmp_path, caplog):
    good = [{"prompt": f"p{i}", "answer": "1"} for i in range(3)]
    lines = (good[0], "{oops", {"prompt": "x"}, good[1], {"prompt": "", "answer": "1"}, good[2])
    with pytest.raises(DataError, match=r"train.jsonl:2: not JSON"):
        source(tmp_path, *lines)
    made = source(tmp_path, *lines, bad_records="skip")
    report = made.reports[0]
    assert made.size == 3 and (report.read, report.used) == (6, 3) and report.dropped == {"bad": 3}
    assert "3 of 6 records used" in caplog.text and "train.jsonl:3: no field 'answer'" in caplog.text
    assert write(made.reports, tmp_path / "left_out.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert [entry["place"].rpartition(":")[2] for entry in listed] == ["2", "3", "5"]
    assert listed[0]["reason"] == "bad" and "not JSON" in listed[0]["detail"]
    with pytest.raises(DataError, match="holds no records, 2 bad ones apart, the first of them"):
        source(tmp_path, "{", "[", bad_records="skip")
    with pytest.raises(ConfigError, match="bad_records=drop"):
        source(tmp_path, *good, bad_records="drop")
    assert not write(source(tmp_path, *good).reports, tmp_path / "none.jsonl") and not (tmp_path / "none.jsonl").exists()


def test_long_prompts_are_left_out_and_counted(tmp_path):
    lines = [{"prompt": "p" * n, "answer": "1"} for n in (3, 10, 4)]
    made = source(tmp_path, *lines, max_prompt_chars=6, template="Q {prompt}", test=({"prompt": "h", "answer": "1"},))
    assert made.size == 2 and made.reports[0].dropped == {"too long": 1}
    assert "train.jsonl:2: prompt of 12 characters, data.max_prompt_chars=6" in made.reports[0].listed[0][2]
    assert source(tmp_path, *lines, max_prompt_tokens=4, model="tiny:block").size == 2
    with pytest.raises(DataError, match="all 3 records are left out"):
        source(tmp_path, *lines, max_prompt_chars=1)
    with pytest.raises(ConfigError, match="the tokenizer of nowhere, which cannot be read"):
        source(tmp_path, *lines, max_prompt_tokens=4, model="nowhere")


def test_tokens_are_counted_by_the_models_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "model").mkdir()
    words.save(str(tmp_path / "model" / "tokenizer.json"))
    lines = [{"prompt": "a " * n, "answer": "1"} for n in (2, 9)]
    made = source(tmp_path, *lines, max_prompt_tokens=4, model=str(tmp_path / "model"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="bad/tokenizer.json cannot be read as a tokenizer"):
        source(tmp_path, *lines, max_prompt_tokens=4, model=str(tmp_path / "bad"))
    assert made.size == 1 and "prompt of 9 tokens, data.max_prompt_tokens=4" in made.reports[0].listed[0][2]


def test_tokenizers_of_the_older_format_count_too(tmp_path):
    """vocab.json and merges.txt, as Dream and its kin have them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder = tmp_path / "model"
    folder.mkdir()
    letters = [*bytes_to_unicode().values(), "aa"]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\na a\n")
    lines = [{"prompt": "a" * n, "answer": "1"} for n in (4, 20)]
    made = source(tmp_path, *lines, max_prompt_tokens=5, model=str(folder))
    assert made.size == 1 and "prompt of 10 tokens" in made.reports[0].listed[0][2]


def test_an_eighth_can_be_held_out_by_content(tmp_path):
    lines = [{"prompt": f"p{i}", "answer": "1"} for i in range(80)]
    made = source(tmp_path, *lines, test_file="held_out")
    held, trained = {p.text for p in made.test_prompts(80)}, {made.prompt(i).text for i in range(made.size)}
    assert not held & trained and len(held) + len(trained) == 80 and 3 < len(held) < 20
    assert made.reports[0].dropped == {"held out": len(held)}
    assert source(tmp_path, *lines[::-1], test_file="held_out", seed=5).test_prompts(80) != []
    with pytest.raises(DataError, match="too few different prompts"):
        source(tmp_path, lines[0], test_file="held_out")


def test_block_sizes_fit_the_model_or_are_refused(tmp_path):
    made = source(tmp_path, *({"prompt": f"p{n}", "answer": "1", "block_size": n} for n in (4, 8)))
    check_block_sizes(made, 0, "tiny:full")
    with pytest.raises(ConfigError, match="blocks of 8, and tiny:block attends in blocks of 4"):
        check_block_sizes(made, 4, "tiny:block")
