"""Settings of an evaluation: where they come from, which decoders they name, and what is refused with a remedy."""

import pytest

from rlpipe import recipe, schema
from rlpipe.config import DecoderConfig, ServerConfig
from rlpipe.errors import ConfigError
from rlpipe.eval.contestants import contestants, fitting
from rlpipe.eval.settings import EvaluationConfig, check, load
from rlpipe.models.spec import DiffusionSpec
from rlpipe.server_settings import identity_of, with_servers_asked

BLOCK = DiffusionSpec(mask_token_id=2, block_size=4)
FULL = DiffusionSpec(mask_token_id=2, attention="full", block_size=0)


def rows(*entries, spec=BLOCK, hex_lengths=(), **base):
    return contestants(entries, DecoderConfig(**base), hex_lengths, spec, "FOLDER")


def refused(call, *args, **kwargs):
    with pytest.raises(ConfigError) as error:
        call(*args, **kwargs)
    return str(error.value)


def checked(*arguments):
    cfg = load(["model.path=FOLDER", *arguments])
    check(cfg)
    return cfg


def test_every_key_is_documented_and_its_sections_are_those_of_a_run():
    own, run = schema.keys(EvaluationConfig), schema.keys()
    for key in own.values():
        assert key.comment or key.name in run, f"{key.name} says nothing about itself"
    assert {name for name in own if "." in name} == {
        name for name in run if name.partition(".")[0] in ("model", "data", "rollout", "verifier", "cluster", "judge", "guide")
    }
    assert "data.options" in schema.free(EvaluationConfig) and "rollout.decoder.options" in schema.free(EvaluationConfig)


def test_short_names_and_lists():
    cfg = checked(
        "task=countdown", "max_tokens=32", "temperature=0", "samples=8", "k=[1,8]", "decoders=[a,{preset: b, threshold: 0.5}]"
    )
    assert (cfg.data.task, cfg.rollout.decoder.max_tokens, cfg.rollout.decoder.temperature) == ("countdown", 32, 0.0)
    assert cfg.k == [1, 8] and cfg.decoders == ["a", {"preset": "b", "threshold": 0.5}]


def finished_run(folder, **changes):
    """What a run of the quickstart leaves, as far as an evaluation looks."""
    cfg = recipe.load(["recipe=quickstart", *(f"{key}={value}" for key, value in changes.items())])
    (folder / "config.yaml").write_text(recipe.to_yaml(cfg), encoding="utf8")
    for step in (20, 40):
        saved = folder / "checkpoints" / f"step_{step:06d}"
        (saved / "model").mkdir(parents=True)
        (saved / "driver.json").write_text("{}", encoding="utf8")
    return folder


@pytest.mark.parametrize("how", ["run={}", "recipe={}/config.yaml"])
def test_a_run_gives_its_newest_weights_task_and_decoder(tmp_path, how):
    folder = finished_run(tmp_path, **{"rollout.decoder.tokens_per_step": 2, "data.template": "ask {prompt}"})
    cfg = load([how.format(folder), "samples=2", "rollout.decoder.temperature=0.5"])
    check(cfg)
    assert cfg.model.path == str(folder / "checkpoints" / "step_000040" / "model")
    assert (cfg.data.task, cfg.data.template, cfg.data.options) == ("sudoku", "ask {prompt}", {"careless": 0.55})
    assert (cfg.rollout.decoder.tokens_per_step, cfg.rollout.decoder.temperature, cfg.samples) == (2, 0.5, 2)
    assert load([how.format(folder), "model.path=OTHER"]).model.path == "OTHER"
    assert load([how.format(folder), "task=countdown"]).data.options == {}, "options belong to a task"


def test_a_run_gives_the_servers_that_its_verifier_and_decoder_ask(tmp_path):
    said = {"verifier.name": "llm_judge", "judge.url": "http://judge/v1", "guide.model": "GUIDE"}
    cfg = load([f"run={finished_run(tmp_path, **said)}"])
    check(cfg)
    assert (cfg.judge.url, cfg.guide.model) == ("http://judge/v1", "GUIDE")
    unasked = with_servers_asked(cfg, ["math"], [])
    assert (unasked.judge, unasked.guide) == (ServerConfig(), ServerConfig()), "nobody waits for a server of no use"
    asked = with_servers_asked(cfg, ["math", "llm_judge"], ["mine"])
    assert (asked.judge, asked.guide) == (cfg.judge, cfg.guide)


def test_servers_that_are_missing_are_found_before_anything_starts():
    assert "judge.url=http" in refused(checked, "verifier=llm_judge")
    assert "judge.url=http" in refused(checked, "data.mixture=[{task: sudoku, verifier: reward_model}]")
    assert "judge.url=localhost" in refused(checked, "judge.url=localhost")
    cfg = checked("task=sudoku")
    assert "judge.url=http" in refused(with_servers_asked, cfg, ["exact", "llm_judge"], [])
    assert "decoder mine has select=guided" in refused(with_servers_asked, cfg, [], ["mine"])


def test_what_a_server_answers_depends_on_its_model_and_not_on_its_address():
    here, there = (ServerConfig(url=f"http://{host}/v1", model="M", key_env=host.upper()) for host in "ab")
    assert identity_of(here) == identity_of(there) != identity_of(ServerConfig(model="N"))
    assert identity_of(ServerConfig(url="http://a")) != identity_of(ServerConfig(url="http://b")), "all that is known of it"
    assert identity_of(ServerConfig(model="M", args={"quantization": "fp8"})) != identity_of(ServerConfig(model="M"))


def test_where_the_settings_come_from_must_be_there(tmp_path):
    assert "no config.yaml" in refused(load, [f"run={tmp_path}"])
    assert "give one of them" in refused(load, [f"run={tmp_path}", "recipe=quickstart"])
    assert "did you mean quickstart?" in refused(load, ["recipe=quikstart"])
    assert "run=outputs/RECIPE/latest" in refused(checked, "recipe=quickstart", "model.path=")
    assert "run=outputs/RECIPE/latest" in refused(checked, "model.path=tiny:block")
    assert "run=outputs/RECIPE/latest" in refused(checked, "model.path=convert:smollm2")
    assert load(["recipe=sft_smollm2_block"]).model.path == "", "made by a run, and no folder to read"


def test_a_run_without_a_checkpoint_is_not_its_first_model(tmp_path):
    cfg = recipe.load(["recipe=quickstart", "model.path=OWNER/NAME"])
    (tmp_path / "config.yaml").write_text(recipe.to_yaml(cfg), encoding="utf8")
    (tmp_path / "checkpoints" / "step_000020.partial" / "model").mkdir(parents=True)
    assert "no complete checkpoint yet" in refused(load, [f"run={tmp_path}"])
    assert load([f"run={tmp_path}", "model.path=OTHER"]).model.path == "OTHER"


@pytest.mark.parametrize(
    "argument, said",
    [
        ("sampels=2", "did you mean samples"),
        ("decoder=[x]", "did you mean decoders"),
        ("samples=0", "at least one response"),
        ("k=[1,8]", "set samples=8"),
        ("k=[0]", "at least 1"),
        ("k=[]", "for example k=[1,1]"),
        ("confidence=95", "between 0 and 1"),
        ("resume=atuo", "did you mean auto?"),
        ("prompts=-1", "0 for all"),
        ("rollout.workers=0", "rollout.workers=0"),
        ("model.dtype=float64", "float32, bfloat16"),
        ("samples=many", "samples"),
    ],
)
def test_what_is_refused_at_once(argument, said):
    assert said in refused(checked, argument)


def test_decoders_have_names_and_keep_what_is_the_recipes_own():
    found = rows("sdar_static", {"preset": "sdar_dynamic", "threshold": 0.5}, {"tokens_per_step": 2}, "rollout", max_tokens=32)
    assert [row.label for row in found] == ["sdar_static", "sdar_dynamic threshold=0.5", "rollout tokens_per_step=2", "rollout"]
    assert all(member.config.max_tokens == 32 for row in found for member in row.members)
    assert found[1].members[0].config.threshold == 0.5 and found[1].members[0].config.select == "threshold"
    assert len({row.members[0].key for row in found}) == 4
    assert [row.label for row in rows()] == ["rollout"]
    assert rows({"preset": "sdar_static", "label": "mine"})[0].label == "mine"


def test_a_key_is_of_the_numbers_and_not_of_the_name():
    named, spelled = rows("left_to_right", {"score": "left_to_right", "label": "spelled"})
    assert named.members[0].key == spelled.members[0].key
    assert rows("rollout", temperature=0.5)[0].members[0].key != rows("rollout")[0].members[0].key


def test_what_contradicts_the_model_is_refused_with_what_fits():
    said = refused(rows, "fast_dllm_dual")
    assert "fast_dllm_dual does not fit FOLDER (blocks of 4)" in said and "sdar_dynamic" in said
    assert "llada_low_confidence" not in said.partition("fit it:")[2]
    said = refused(rows, "rcr_block", "rcr", spec=BLOCK)
    assert "rcr does not fit" in said
    assert "fast_dllm_dual" in fitting(DecoderConfig(), FULL) and "rcr" in fitting(DecoderConfig(), FULL)
    for name in fitting(DecoderConfig(), BLOCK):
        rows(name)


@pytest.mark.parametrize(
    "entry, said",
    [
        ("sdar_dinamic", "did you mean sdar_dynamic?"),
        ({"preset": "sdar_dynamic", "treshold": 0.5}, "did you mean threshold?"),
        ({"threshold": "high"}, "threshold"),
        ({"select": "threshhold"}, "did you mean threshold?"),
        ({"threshold": 2.0}, "probability"),
        ({"eos_gamma": 3.0}, "eos_gamma=3.0 must be at most 1"),
        ({"hex": 4}, "hex=4"),
        (7, "a named decoder, or a mapping"),
    ],
)
def test_entries_that_are_no_decoder(entry, said):
    message = refused(rows, entry)
    assert said in message and "decoders" in message


def test_two_rows_of_one_name():
    assert "two are called 'sdar_static'" in refused(rows, "sdar_static", "sdar_static")


def test_hex_is_a_row_of_several_block_lengths():
    one, vote = rows("llada_random", spec=FULL, hex_lengths=[4, 8])
    assert (one.hex, vote.hex, vote.label) == ((), (4, 8), "llada_random, HEX")
    assert [member.config.block_size for member in vote.members] == [4, 8]
    (own,) = rows({"preset": "llada_random", "hex": [2, 16]}, spec=FULL, hex_lengths=[4, 8])
    assert own.hex == (2, 16), "an entry with lengths of its own is no other's base"
    assert "HEX needs full attention" in refused(rows, "sdar_static", hex_lengths=[4, 8])
    for lengths in ([0], [8, 8], [4, -8]):
        assert "different block lengths" in refused(rows, "llada_random", spec=FULL, hex_lengths=lengths)
        assert "decoders[0].hex" in refused(rows, {"preset": "llada_random", "hex": lengths}, spec=FULL)


def test_a_named_decoder_of_evaluations_in_training_replaces_everything():
    plain = recipe.load(["recipe=quickstart"])
    assert plain.eval.decoder == {"select": "threshold"}
    cfg = recipe.load(["recipe=quickstart", "eval.decoder={preset: sdar_static}"])
    assert cfg.eval.decoder == {"preset": "sdar_static"}
    assert recipe.decoder_of_eval(cfg).select == "static", "the default of eval.decoder does not stay beside a name"
    cfg = recipe.load(["recipe=quickstart", "eval.decoder.preset=sdar_sequential", "eval.decoder.temperature=0"])
    assert cfg.eval.decoder == {"preset": "sdar_sequential", "temperature": 0}
    cfg = recipe.load(["recipe=quickstart", "eval.decoder.temperature=0"])
    assert cfg.eval.decoder == {"select": "threshold", "temperature": 0}, "without a name settings add up"
