"""The supervised warm start: masks, targets, learning, cache."""

import copy
import json

import numpy as np
import pytest
import torch
from tiny_models import ALPHABET, tiny
from tokenizers.processors import TemplateProcessing

from rlpipe import warm_start
from rlpipe.config import ModelConfig, RunConfig, WarmStartConfig
from rlpipe.errors import DataError
from rlpipe.models.loading import load_model
from rlpipe.models.made_once import made_once
from rlpipe.models.tiny import build_tiny
from rlpipe.trajectory import Prompt


class CopySource:
    """Repeat two digits: learnable in seconds."""

    alphabet, identity = ALPHABET, "copy"

    def demonstration(self, index: int) -> Prompt:
        digits = f"{index * 7919 % 100:02d}"
        return Prompt(uid=f"copy/{index}", task="copy", text=digits, demonstration=digits * 2)


@pytest.mark.parametrize("prompt_len, length, size", [(4, 8, 4), (5, 7, 4), (7, 9, 4), (3, 9, 0)])
def test_masks_are_exact_counts_and_leave_the_prompt_alone(prompt_len, length, size):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        masked, weight = warm_start.random_masks(prompt_len, length, size, rng)
        assert masked.shape == (1, length) and len(weight) == masked.sum()
        blocks = np.split(masked[0], np.arange(-prompt_len % size, length, size)) if size else [masked[0]]
        counts = [int(block.sum()) for block in blocks if len(block)]
        assert min(counts) >= 1
        assert weight.sum() == pytest.approx(len(counts))  # each block's loss is a mean
        seen.update(counts)
    assert seen == set(range(1, (size or length) + 1))


def test_responses_end_with_eos_up_to_the_grid():
    _, tokenizer = tiny("block")
    eos = tokenizer.eos_token_id
    ids = lambda text, *rest: warm_start.response_ids(tokenizer, Prompt(uid="u", task="t", text="", demonstration=text), *rest)  # noqa: E731
    assert ids("123", 5, 16, 4).tolist() == [*tokenizer("123")["input_ids"], *[eos] * 4]  # 5 + 7 = 12
    assert ids("1234", 4, 4, 4).tolist() == tokenizer("1234")["input_ids"]  # full: no room for EOS
    assert ids("123", 5, 6, 0).tolist() == [*tokenizer("123")["input_ids"], *[eos] * 3]
    with pytest.raises(DataError, match="max_tokens"):
        ids("12345", 4, 4, 4)
    opened = copy.deepcopy(tokenizer)
    opened.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    assert opened("1")["input_ids"][0] == 0  # a tokenizer that begins every text with a token: the answer is no text's start
    prompt = Prompt(uid="u", task="t", text="", demonstration="123")
    assert warm_start.response_ids(opened, prompt, 5, 16, 4).tolist() == ids("123", 5, 16, 4).tolist()
    with pytest.raises(DataError, match="no demonstration"):
        warm_start.response_ids(tokenizer, Prompt(uid="u", task="t", text=""), 4, 4, 4)


@pytest.mark.parametrize("kind", ("block", "full"))
def test_the_loss_falls_and_the_run_is_reproducible(kind):
    def run() -> tuple[list[float], torch.Tensor]:
        model, tokenizer = build_tiny(ModelConfig(path=f"tiny:{kind}", layers=1, width=32, heads=2, mlp=64), ALPHABET, 0)
        config = WarmStartConfig(steps=60, batch_size=16, lr=1e-2)
        return warm_start.train(model, tokenizer, CopySource().demonstration, config, 4, 0), model.lm.lm_head.weight

    losses, weight = run()
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    again, same = run()
    assert losses == again and torch.equal(weight, same)


def test_the_initial_model_is_cached_by_content(tmp_path):
    cfg = RunConfig(output_dir=str(tmp_path))
    cfg.model = ModelConfig(layers=1, width=32, heads=2, mlp=64)
    cfg.warm_start = WarmStartConfig(steps=3, batch_size=4)
    steps: list[int] = []
    folder = warm_start.initial_model(cfg, CopySource(), lambda done, total: steps.append(done))
    assert steps == [1, 2, 3] and len(json.loads((folder / "warm_start.json").read_text())["losses"]) == 3
    assert warm_start.initial_model(cfg, CopySource(), lambda *_: pytest.fail("trained again")) == folder
    cfg.data.options = {"careless": 0.5}
    assert warm_start.initial_model(cfg, CopySource()) != folder
    edited = CopySource()
    edited.identity = "copy, with other records in the same file"
    assert warm_start.initial_model(cfg, edited) != warm_start.initial_model(cfg, CopySource())
    assert load_model(folder).spec.block_size == 4
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_is_made_once_and_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "cache" / "made"
    with pytest.raises(RuntimeError), made_once(folder) as partial:
        partial.mkdir()
        raise RuntimeError("broke off")
    assert not list(folder.parent.iterdir())
    with made_once(folder) as partial:
        partial.mkdir()
        (partial / "file").write_text("first")
    with made_once(folder) as partial:  # another process, which started before the first was done
        partial.mkdir()
        (partial / "file").write_text("second")
    assert [path.name for path in folder.parent.iterdir()] == ["made"] and (folder / "file").read_text() == "first"
