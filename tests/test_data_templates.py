"""Templates: what the model reads, to the character."""

import json

import pytest

from rlpipe.config import DataConfig, RunConfig
from rlpipe.data.description import describe_source, missing_data
from rlpipe.data.model_files import ModelFiles
from rlpipe.data.registry import build_source, source_of
from rlpipe.data.templates import ASKS, STDIO, TURNS, newest, or_without_chat, resolve
from rlpipe.errors import ConfigError, DataError
from rlpipe.trajectory import Prompt

CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def model(tmp_path, template=CHATML, name="model", **settings):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    found = {"bos_token": {"content": "<s>"}, "chat_template": template} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(found))
    return ModelFiles(str(folder))


def prompt(text="1+1?", **facts):
    return Prompt(uid="u", task="t", text=text, **facts)


STDIO_TESTS = {"tests": {"kind": "stdio", "inputs": [], "outputs": []}}
RENDERED = {  # template → what TraceRL and its kin show the model, written by hand
    "{prompt} =": "1+1? =",
    "plain": "1+1?",
    "boxed": "1+1?\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "sdar:boxed": "<|im_start|>user\n1+1?\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>assistant\n",
    "sdar_think@1:boxed_first@1": "<|im_start|>user\nYou need to put your final answer in \\boxed{}. This is the problem:\n1+1?"
    "<|im_end|>\n<|im_start|>assistant<think>\n",
    "dream:boxed": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n1+1?\nPlease reason step by "
    "step, and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n",
    "llada_tracerl:boxed_first": "<|startoftext|><|start_header_id|>user<|end_header_id|>You need to put your final answer in "
    "\\boxed{}. This is the problem:\n1+1?<|eot_id|><|startoftext|><|start_header_id|>assistant<|end_header_id|>\n",
    "llada": "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\n",
    "sdar:Say {prompt}": "<|im_start|>user\nSay 1+1?<|im_end|>\n<|im_start|>assistant\n",
    "note: {prompt}": "note: 1+1?",
}


@pytest.mark.parametrize("setting", RENDERED)
def test_named_templates_render_as_written_by_hand(setting):
    assert resolve(setting).render(prompt()) == RENDERED[setting]


def test_programs_that_read_and_print_are_asked_for_otherwise():
    template = resolve("sdar:code_tracerl")
    assert template.render(prompt(answer=STDIO_TESTS)) == (
        "<|im_start|>user\nThis is the problem:\n1+1?\nYou should put your code in ```python ```. Use input() to read input "
        "and print() to produce output in your script. <|im_end|>\n<|im_start|>assistant\n"
    )
    assert "Do not include more than one code block. <|im_end|>" in template.render(prompt())
    assert set(STDIO) <= set(ASKS) and resolve("boxed").render(prompt(answer=STDIO_TESTS)) == RENDERED["boxed"]


def test_a_text_is_put_in_once_whatever_it_holds():
    assert resolve("sdar:boxed").render(prompt("{prompt}{x}")).count("{prompt}{x}") == 1


def test_the_models_own_chat_template(tmp_path):
    files = model(tmp_path)
    assert resolve("chat", files).render(prompt(" hi ")) == "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    boxed = resolve("chat:boxed", files).render(prompt(context=(("system", "Be brief."),)))
    assert boxed == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?\nPlease reason step by step, and put your final "
        "answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert resolve("chat:{prompt}!", files).render(prompt()).count("1+1?!<|im_end|>") == 1
    with pytest.raises(DataError, match="u has 1 turns before its last one, and data.template=sdar@1 cannot show them"):
        resolve("sdar").render(prompt(context=(("system", "Be brief."),)))


def test_chat_templates_are_rendered_as_transformers_does(tmp_path):
    """Loop controls, trimmed blocks, its functions, messages as dicts."""
    text = (
        "{%- for m in messages %}\n    {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
        "    {{- m.content + '|' }}\n{%- endfor %}{{ tools is none }}{{ [1, 'é'] | tojson }}{{ eos_token }}"
    )
    files = model(tmp_path, text, eos_token="</s>")
    turns = [("system", "s"), ("user", "a"), ("user", "b")]
    transformers = pytest.importorskip("transformers")
    render = transformers.utils.chat_template_utils.render_jinja_template
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = render([messages], chat_template=text, add_generation_prompt=True, eos_token="</s>", bos_token="<s>")[0][0]
    assert files.chat(turns) == expected == 'a|b|True[1, "é"]</s>'


def test_where_chat_templates_are_found(tmp_path):
    assert model(tmp_path, [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]).chat_source == "D"
    folder = tmp_path / "model"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert ModelFiles(str(folder)).chat_source == "J"
    (folder / "chat_template.jinja").write_text("X")
    assert ModelFiles(str(folder)).chat_source == "X" and ModelFiles(f"convert:{folder}").chat_source == "X"
    for none in (ModelFiles("tiny:block"), ModelFiles(""), ModelFiles("no/such", fetch=False)):
        assert none.chat_source == ""


def test_a_token_that_the_tokenizer_puts_first_itself_is_not_put_twice(tmp_path):
    from tokenizers import Tokenizer, models, processors

    files = model(tmp_path, add_bos_token=False)
    assert files.chat([("user", "q")]).startswith("<s><|im_start|>")
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1}, unk_token="[UNK]"))
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words.save(str(tmp_path / "model" / "tokenizer.json"))
    assert ModelFiles(files.path).chat([("user", "q")]).startswith("<|im_start|>")
    assert model(tmp_path, name="other", add_bos_token=True).chat([("user", "q")]).startswith("<|im_start|>")


def test_models_without_a_chat_template_say_so(tmp_path):
    with pytest.raises(ConfigError, match="tiny:block, and it has none"):
        resolve("chat", ModelFiles("tiny:block")).render(prompt())
    assert or_without_chat("chat:boxed", ModelFiles("tiny:block")).name == "boxed@1"
    assert or_without_chat("chat", ModelFiles("tiny:block")).name == "plain@1"
    assert or_without_chat("chat:boxed", model(tmp_path)).is_chat
    with pytest.raises(DataError, match="its chat template refuses the conversation: no system turn"):
        model(tmp_path, "{{ raise_exception('no system turn') }}").chat([("system", "s")])
    with pytest.raises(DataError, match="its chat template cannot be read"):
        model(tmp_path, "{% if %}").chat([("user", "s")])
    with pytest.raises(DataError, match="refuses"):
        model(tmp_path, "{{ messages.append(1) }}").chat([("user", "s")])
    (tmp_path / "model" / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer_config.json is not JSON"):
        ModelFiles(str(tmp_path / "model")).chat([("user", "s")])


@pytest.mark.parametrize(
    "setting, message",
    [
        ("solve", r"neither a text with \{prompt\} in it.*did you mean"),
        ("boxd", "did you mean boxed"),
        ("sdr:boxed", "did you mean sdar"),
        ("sdar:boxd", "did you mean boxed"),
        ("boxed@7", "did you mean boxed@1"),
    ],
)
def test_unknown_templates_are_refused_with_the_nearest(setting, message):
    with pytest.raises(ConfigError, match=message):
        resolve(setting)


def test_versions():
    table = {"a@1": "1", "a@10": "10", "a@2": "2"}
    assert newest("a", table) == "a@10" and newest("a@2", table) == "a@2" and newest("b", table) == newest("a@3", table) == ""
    assert all("{prompt}" in text for text in [*ASKS.values(), *STDIO.values(), *TURNS.values()] if text)
    assert resolve("x {prompt}").label != resolve("y {prompt}").label


def test_labels_tell_chat_templates_apart(tmp_path):
    one, other = (resolve("chat:boxed", model(tmp_path, text, text)) for text in ("a", "b"))
    assert one.name == other.name == "chat@1:boxed@1" and one.label != other.label
    made = build_source(DataConfig(template="sdar:boxed"), 0)
    assert "in template sdar@1:boxed@1" in made.identity and set("<|im_start|>") <= set(made.alphabet)


def test_a_source_in_the_models_chat_template(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}]
    path.write_text(json.dumps({"prompt": turns, "answer": "1"}))
    held = tmp_path / "b.jsonl"
    held.write_text(json.dumps({"prompt": "h", "answer": "1"}))
    cfg = RunConfig()
    cfg.data = DataConfig(task="records", train=str(path), test=str(held), template="chat")
    cfg.model.path = model(tmp_path).path
    made = source_of(cfg)
    assert made.prompt(0).text == ("<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")
    assert made.prompt(0).context == () and made.test_prompts(1)[0].text.startswith("<s><|im_start|>user\nh")
    text = describe_source(cfg)
    assert "template of records: chat@1 (chat template" in text and "| <s><|im_start|>system" in text
    assert "1 of 1 records used, shape rlpipe" in text and "judged by: exact" in text


def test_what_a_dry_run_says_of_data_that_is_not_here(tmp_path):
    cfg = RunConfig()
    cfg.data.task = "gsm8k"
    text = describe_source(cfg)
    assert "openai/gsm8k,subset=main,split=train is not in the cache" in text and "template of gsm8k: boxed@1" in text
    assert len(missing_data(cfg.data)) == 2
    cfg.data.train = cfg.data.test = str(tmp_path / "none.jsonl")
    assert missing_data(cfg.data) == [f"the data: no file {tmp_path}/none.jsonl (data.{key})" for key in ("train", "test")]
    cfg.data = DataConfig(task="humaneval")
    assert missing_data(cfg.data) == []
    cfg.model.path = "no/such"
    assert "the chat template and the tokenizer of no/such" in describe_source(cfg)
    assert missing_data(DataConfig(mixture=[{"task": "gsm8k"}, {"task": "sudoku"}])) != []
    assert missing_data(DataConfig()) == []
