"""Families: checkpoints in their original layout give the logits of their plain description, and go back bit by bit."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from plain_architectures import LLADA, PLAIN, SDAR, Plain, without
from published_configs import PUBLISHED
from safetensors.torch import load_file, save_file
from test_packing import replay
from tiny_models import sample

from rlpipe import model_shapes
from rlpipe.errors import ConfigError, ModelError
from rlpipe.models.attention import DensePlan
from rlpipe.models.executor import Executor
from rlpipe.models.families import FAMILIES, find_family
from rlpipe.models.family import Family, TokenFacts
from rlpipe.models.loading import load_model, load_tokenizer, save_model
from rlpipe.models.packing import make_piece, pack
from rlpipe.models.spec import CONFIG_KEY
from rlpipe.models.tokenizer import character_tokenizer

ALPHABET = "0123456789+-*/=() abcdefgh"
T = 11


def family_of(key: str) -> str:
    return key.split("-")[0]


def write(folder, plain: Plain, dtype=torch.float32, **config):
    """The folder of a checkpoint, as its publisher would write it."""
    save_file(plain.tensors(dtype=dtype), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(plain.config | config))
    character_tokenizer(ALPHABET).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Models by their key in PLAIN, from folders in the original layout; open_dcoder is named, as its files do not tell."""
    models = {}

    def get(key: str):
        if key not in models:
            folder = write(tmp_path_factory.mktemp(key), PLAIN[key])
            models[key] = load_model(folder, family="open_dcoder" if key == "open_dcoder" else "")
        return models[key]

    return get


def canvas(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 37, (T,), generator=generator), torch.arange(T)


@pytest.mark.parametrize("key", PLAIN)
@torch.no_grad()
def test_logits_are_those_of_the_plain_description(loaded, key):
    plain, model = PLAIN[key], loaded(key)
    ids, positions = canvas()
    seen = plain.seen(positions)
    expected = plain.logits(plain.tensors(), plain.config, ids, positions, seen)
    rows = (positions - model.spec.logit_shift).clamp_min(0)
    for forward in (model.hidden, Executor.of(model.lm).hidden):
        hidden = forward(ids[None], positions[None], DensePlan(seen[None]))[0]
        found = model.lm.lm_head(hidden[rows]).double()
        assert (found - expected).abs().max() < 1e-5 < 0.1 < expected.std()
    assert type(model.lm).__name__ == plain.stock


@pytest.mark.parametrize("key", PLAIN)
def test_the_spec_is_read_from_config_and_tokenizer(loaded, key):
    spec = loaded(key).spec.to_dict()
    assert {name: spec[name] for name in PLAIN[key].spec} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in PLAIN[key].spec.items()
    }


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("key", PLAIN)
def test_what_is_saved_is_what_was_published_to_the_bit(tmp_path, key, dtype):
    (tmp_path / "in").mkdir()
    folder = write(tmp_path / "in", PLAIN[key], dtype)
    named = {"family": "open_dcoder"} if key == "open_dcoder" else {}
    model = load_model(folder, str(dtype).removeprefix("torch."), **named)
    save_model(model, load_tokenizer(folder), tmp_path / "out", shard_bytes=20_000)
    published = load_file(folder / "model.safetensors")
    saved = {
        name: tensor for file in sorted((tmp_path / "out").glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    assert saved.keys() == published.keys() == PLAIN[key].shapes.keys()
    for name, tensor in published.items():
        assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = without(PLAIN[key].config, "torch_dtype")
    assert {name: config[name] for name in said} == said
    assert load_model(tmp_path / "out", **named).spec == model.spec


@pytest.mark.parametrize("key", PLAIN)
def test_a_map_goes_there_and_back(loaded, key):
    """Stock → original → stock: the same names, each once, the same bits, and storage of their own."""
    model, family = loaded(key), FAMILIES[family_of(key)]
    weights = family.weights(PLAIN[key].config)
    stock = model.lm.state_dict()
    names = weights.original_names(stock)
    assert set(names) == PLAIN[key].shapes.keys() and len(names) == len(set(names))
    made = {name: weights.original(name) for name in names}
    originals = {name: origin.make([stock[part] for part in origin.names]) for name, origin in made.items()}
    assert {name: tuple(tensor.shape) for name, tensor in originals.items()} == PLAIN[key].shapes
    for name, tensor in stock.items():
        origin = weights.stock(name)
        assert torch.equal(origin.make([originals[part] for part in origin.names]), tensor), name
    cut = [name for name, origin in made.items() if "experts" in origin.names[0]]
    assert len({originals[name].untyped_storage().data_ptr() for name in cut}) == len(cut)


def scored_everywhere(model, prompt, response, masked):
    """Our learner's log-probabilities of all masked positions of one canvas."""
    ends = {"block_size": model.spec.block_size, "mask_id": model.spec.mask_token_id, "logit_shift": model.spec.logit_shift}
    piece = make_piece(prompt, response, masked[None], masked[None], **ends)
    batch = pack([piece], [piece.slot])
    with torch.no_grad():
        logp, _ = model(batch.input_ids, batch.position_ids, batch.plan(), batch.index, batch.targets)
    found = np.zeros(len(response))
    found[batch.slot.numpy()] = logp.double().numpy()
    return found[: masked.sum()]


@pytest.mark.parametrize("key", PLAIN)
def test_the_learner_scores_as_the_plain_description_does(loaded, key):
    """Packed, on the absolute grid, the prompt's tail in the first block; in Dream row p - 1 scores position p, the first
    response token from the last prompt token (as TraceRL's published code: logits[:, :-1] against labels[:, 1:])."""
    plain, model = PLAIN[key], loaded(key)
    size = plain.block or 4
    prompt = np.random.default_rng(1).integers(4, 37, size + 1)
    response = np.random.default_rng(2).integers(4, 37, 2 * size - 1)
    masked = np.random.default_rng(3).random(len(response)) < 0.6
    masked[0] = True
    ids = np.concatenate([prompt, np.where(masked, model.spec.mask_token_id, response)])
    if plain.block:  # a noisy block sees clean ones before it: one forward a block, as the sampler does
        clean, expected = np.concatenate([prompt, response]), []
        for start in range(size, len(ids), size):
            state = np.concatenate([clean[:start], ids[start : start + size]])
            expected.append(plain_logits(plain, state)[start : start + size])
        logits = torch.cat(expected)[len(prompt) - size :]
    else:
        logits = plain_logits(plain, ids)[len(prompt) :]
    logits[:, list(model.spec.forbidden_ids)] = -torch.inf
    expected = torch.log_softmax(logits, -1)[torch.arange(len(response)), torch.as_tensor(response)]
    np.testing.assert_allclose(scored_everywhere(model, prompt, response, masked), expected.numpy()[masked], rtol=0, atol=1e-5)


def plain_logits(plain: Plain, ids) -> torch.Tensor:
    positions = torch.arange(len(ids))
    return plain.logits(plain.tensors(), plain.config, torch.as_tensor(ids), positions, plain.seen(positions))


@pytest.mark.parametrize("key", PLAIN)
def test_the_sampler_and_the_learner_agree(loaded, key):
    model = loaded(key)
    prompts = [np.arange(4, 9 + extra, dtype=np.int32) for extra in range(3)]
    records, _ = sample(model, prompts, max_tokens=8)
    assert replay(model, records, 3).max() <= 1e-5


def test_block_grids_are_absolute():
    """As JetEngine's state machine has it: five prompt tokens on blocks of 4 leave one of them in the first noisy block."""
    spec = FAMILIES["sdar"].spec(SDAR.config)
    masked = np.ones((1, 3), bool)
    piece = make_piece(
        np.arange(4, 9), np.arange(10, 13), masked, masked, block_size=spec.block_size, mask_id=spec.mask_token_id
    )
    batch = pack([piece], [piece.slot])
    assert batch.input_ids[0].tolist() == [4, 5, 6, 7, 8, 2, 2, 2]
    assert batch.tags.block.tolist() == [0] * 4 + [1] * 4


# What a config.json says ----------------------------------------------------------------------------------------------------


def test_families_are_recognised():
    for key, plain in PLAIN.items():
        if key != "open_dcoder":
            assert find_family(plain.config).name == family_of(key)
            assert find_family(plain.config | {CONFIG_KEY: {"mask_token_id": 2}}).name == family_of(key)
    assert find_family({"model_type": "sdar"}).name == "sdar"
    coder = PLAIN["open_dcoder"].config
    assert find_family(coder, tokens=TokenFacts(added={"<M>": 30})).name == "open_dcoder"
    assert find_family(coder | {CONFIG_KEY: {"mask_token_id": 2}}, tokens=TokenFacts(added={"<M>": 30})).name == "stock"
    assert find_family(coder, "dream").name == "dream"


@pytest.mark.parametrize(
    "config, name, said",
    [
        ({"architectures": ["SDARForCasualLM"]}, "", "nearest known is SDARForCausalLM"),
        ({"architectures": ["Fast_dLLM_QwenForCausalLM"]}, "", "shifts logits inside blocks"),
        ({"architectures": ["DreamForCausalLM"], "model_type": "Dream"}, "", "shares the name with Dream"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "", "model.family .open_dcoder."),
        ({"architectures": ["Qwen3ForCausalLM"]}, "", "nothing says how this model denoises"),
        ({}, "", "names nothing"),
        ({}, "lada", "did you mean llada"),
    ],
)
def test_unknown_architectures_are_refused_with_the_nearest(config, name, said):
    with pytest.raises(ModelError, match=said):
        find_family(config, name)


@pytest.mark.parametrize(
    "key, change, said",
    [
        ("llada", {"activation_type": "swiglu"}, "activation_type is 'swiglu'.*only 'silu'"),
        ("llada", {"include_qkv_bias": True}, "include_qkv_bias"),
        ("llada", {"mlp_hidden_size": None}, "has no mlp_hidden_size"),
        ("llada_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size is 8.*only nothing"),
        ("llada2", {"norm_head": True}, "norm_head"),
        ("llada2", {"num_experts": None}, "has no num_experts"),
        ("sdar_moe", {"norm_topk_prob": None}, "has no norm_topk_prob"),
        ("sdar", {"rope_theta": None}, "no rope_theta"),
        ("sdar", {"use_sliding_window": True}, "use_sliding_window"),
        ("sdar", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("sdar", {"num_attention_heads": "four"}, "num_attention_heads is 'four'.*number above 0"),
        ("llada", {"n_heads": 0}, "n_heads is 0"),
        ("sdar", {"rms_norm_eps": "small"}, "contradicts itself"),
    ],
)
def test_networks_that_the_stock_class_does_not_compute_are_refused(key, change, said):
    with pytest.raises(ModelError, match=said):
        FAMILIES[key].config(PLAIN[key].config | change)


@pytest.mark.parametrize("change", [{"use_sliding_window": True}, {"quantization_config": {}}, {"rope_type": "dynamic"}])
def test_stock_classes_are_refused_what_no_plan_computes(change):
    config = without(SDAR.config, "block_size", "mask_token_id") | {"architectures": ["Qwen3ForCausalLM"]}
    if "rope_type" in change:
        change = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    for family in (FAMILIES["stock"], FAMILIES["sdar"]):
        with pytest.raises(ModelError, match="quantization_config|sliding_window|its neighbours"):
            family.config(config | change)


def test_a_stock_mixture_is_read_and_written_as_transformers_does(tmp_path):
    """transformers holds experts stacked and writes them one by one."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = FAMILIES["sdar_moe"].config(PLAIN["sdar_moe"].config)
    assert isinstance(config, Qwen3MoeConfig)
    lm = Qwen3MoeForCausalLM(config)
    setattr(lm.config, CONFIG_KEY, {"mask_token_id": 2, "eos_token_ids": [1]})
    lm.save_pretrained(tmp_path / "in")
    tokenizer = character_tokenizer(ALPHABET)
    model = load_model(tmp_path / "in")
    save_model(model, tokenizer, tmp_path / "out")
    for state in (model.lm.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()):
        assert state.keys() == lm.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in lm.state_dict().items())


def test_old_and_new_rotary_settings_are_read_alike():
    family, config = FAMILIES["sdar"], SDAR.config
    new = without(config, "rope_theta", "rope_scaling") | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}
    assert family.config(new).rope_parameters == family.config(config).rope_parameters
    yarn = family.config(config | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}})
    assert yarn.rope_parameters["rope_type"] == "yarn" and yarn.rope_parameters["factor"] == 4.0


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_published_networks_have_their_published_sizes(hub_id):
    config, billions = PUBLISHED[hub_id]
    family = find_family(config)
    with torch.device("meta"):
        lm = family.model_class(config)(family.config(config))
    count = sum(parameter.numel() for parameter in lm.parameters())
    assert abs(count / 1e9 - billions) < 0.006 * billions
    assert abs(model_shapes.PUBLISHED[hub_id].shape.parameters - count) < 1e-3 * count, "what a plan counts"
    assert model_shapes.PUBLISHED[hub_id].block == family.spec(config).block_size
    known = {"sdar": 151669, "sdar_moe": 151669, "dream": 151666, "llada": 126336, "llada_moe": 156895, "llada2": 156895}
    assert family.spec(config).mask_token_id == known[family.name]


def test_where_mask_and_ends_come_from():
    family, bare = FAMILIES["llada"], without(LLADA.config, "mask_token_id", "eos_token_id", "pad_token_id")
    big = bare | {"embedding_size": 126464}
    assert family.spec(big).mask_token_id == 126336 and family.spec(big).eos_token_ids == (126081, 126348)
    with pytest.raises(ModelError, match="MASK has id 126336, but the embedding has 40 rows"):
        family.spec(bare)
    assert family.spec(bare, TokenFacts(added={"<|mdm_mask|>": 7, "<|eot_id|>": 8})).to_dict() | {"suppressed_ids": []} == {
        "mask_token_id": 7, "eos_token_ids": [8], "attention": "full", "block_size": 0, "logit_shift": 0, "suppressed_ids": [],
    }  # fmt: skip
    said = TokenFacts(generation={"mask_token_id": 5, "eos_token_id": [1, 9]}, mask_id=6, eos_id=4, pad_id=3)
    spec = family.spec(bare, said)
    assert (spec.mask_token_id, spec.eos_token_ids, spec.suppressed_ids) == (5, (1, 4, 9), (3,))
    assert family.spec(LLADA.config | {"mask_token_id": 11}, said).mask_token_id == 11
    with pytest.raises(ModelError, match="nothing says which id MASK has"):
        FAMILIES["a2d_qwen2"].spec(without(PLAIN["a2d_qwen2"].config, "mask_token_id"))
    assert FAMILIES["sdar"].spec(SDAR.config | {"block_size": 16}).block_size == 16
    assert FAMILIES["sdar"].spec(without(SDAR.config, "block_size")).block_size == 4


# A family of the user's -----------------------------------------------------------------------------------------------------

MINE = """
from rlpipe.models.family import Family
from rlpipe.models.weight_map import Rename

MINE = Family(
    name="mine",
    architectures=("MineForDiffusion",),
    stock="Qwen3ForCausalLM",
    keys={"hidden_size": "width"},
    rules=lambda config: (Rename("model.{rest}", "net.{rest}"), Rename("lm_head.weight", "out.weight")),
    attention="block",
    block_size=8,
    mask_id=2,
)
"""


def test_a_family_from_a_file_is_a_literal(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    width = SDAR.config["hidden_size"]
    config = without(SDAR.config, "hidden_size", "block_size") | {"architectures": ["MineForDiffusion"], "width": width}
    (tmp_path / "model").mkdir()
    tensors = {name.replace("model.", "net.").replace("lm_head", "out"): t for name, t in SDAR.tensors().items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path / "model", family=f"{path}:MINE")
    assert model.spec.block_size == 8 and model.spec.mask_token_id == 2
    ids, positions = canvas()
    seen = SDAR.seen(positions)
    with torch.no_grad():
        found = model.lm.lm_head(model.hidden(ids[None], positions[None], DensePlan(seen[None]))[0]).double()
    assert (found - SDAR.logits(SDAR.tensors(), SDAR.config, ids, positions, seen)).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="no Family MIND; did you mean MINE"):
        find_family(config, f"{path}:MIND")
    assert len(MINE.strip().splitlines()) <= 30


def test_a_stock_class_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(ModelError, match="Qwen3ForCasualLM.*did you mean Qwen3ForCausalLM"):
        Family("mine", ("Mine",), "Qwen3ForCasualLM").config(SDAR.config)


def test_routing_is_the_same_in_every_batch(loaded):
    """A token's experts depend on that token alone: packed with others it has the same hidden state."""
    for key in ("sdar_moe", "llada_moe", "llada2"):
        model, (ids, positions) = loaded(key), canvas()
        both = torch.stack([ids, ids.flip(0)])
        with torch.no_grad():
            alone = model.hidden(ids[None], positions[None], DensePlan(None))[0]
            together = model.hidden(both, positions.expand(2, -1), DensePlan(None))[0]
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("key", ("sdar_moe", "llada_moe", "llada2"))
def test_experts_and_routers_learn_and_nothing_is_added_to_the_loss(loaded, key):
    model = loaded(key)
    masked = np.ones((1, 7), bool)
    piece = make_piece(np.arange(4, 13), np.arange(10, 17), masked, masked, block_size=PLAIN[key].block, mask_id=2)
    batch = pack([piece], [piece.slot])
    model.zero_grad()
    logp, _ = model(batch.input_ids, batch.position_ids, batch.plan(), batch.index, batch.targets)
    logp.sum().backward()
    parts = dict(model.lm.named_parameters())
    for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        grad = parts[f"model.layers.2.mlp.{part}"].grad
        assert torch.isfinite(grad).all() and grad.abs().max() > 0
    assert not model.lm.config.output_router_logits
    model.zero_grad()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_whole(name):
    family = FAMILIES[name]
    assert isinstance(family, Family) and family.name == name
    assert (family.attention == "block") == (family.block_size > 0) and not (family.logit_shift and family.block_size)
    shared = {a for other in FAMILIES.values() if other is not family and not other.marker for a in other.architectures}
    assert family.marker or not shared & set(family.architectures)


def test_importing_the_families_loads_no_transformers():
    code = "import sys, rlpipe.models.families; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
