"""The client of language-model servers, the engine's process and the actor around it: real HTTP, real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from openai_server import OpenAIServer

from rlpipe.config import RunConfig, ServerConfig, VerifierConfig
from rlpipe.errors import ConfigError, ServerError
from rlpipe.server_settings import check_servers, wanted
from rlpipe.serving import cache as cache_module
from rlpipe.serving import connection, engine, leash
from rlpipe.serving.cache import AnswerCache, key_of
from rlpipe.serving.client import Client
from rlpipe.serving.connection import Address
from rlpipe.serving.server import Servers

ASKED = [{"role": "user", "content": "?"}]


@pytest.fixture
def server():
    with OpenAIServer(chat=lambda messages, body: messages[-1]["content"] + "!") as running:
        yield running


@pytest.fixture
def client(server, monkeypatch):
    monkeypatch.setattr(connection, "FIRST_PAUSE_S", 0.01)
    made = Client(ServerConfig(url=server.url, model="scripted"))
    yield made
    made.close()


@pytest.mark.parametrize("fault", [500, 503, 429, ("429", 0), "drop", "broken"])
def test_passing_faults_are_tried_again(server, client, fault):
    server.faults = [fault] * 3
    assert client.chat(ASKED, timeout_s=10.0).text == "?!"
    assert server.requests == {"/v1/chat/completions": 4}


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_final_and_shown(server, client, status):
    server.fault = status
    with pytest.raises(ServerError, match=rf"/v1/chat/completions\) refused the request, status {status}.*scripted {status}"):
        client.chat(ASKED, timeout_s=10.0)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "fault, cause", [("hang", "no whole answer"), (500, "scripted 500"), ("drop", "Disconnected"), (("429", 60), "status 429")]
)
def test_the_deadline_holds_whatever_the_server_does(server, client, fault, cause):
    server.fault = fault
    with pytest.raises(ServerError, match=rf"gave no answer in 1 s, .* attempt\(s\); last: .*{cause}"):
        client.chat(ASKED, timeout_s=1.0)


def test_no_server_at_all(client, server):
    gone = Client(ServerConfig(url="http://127.0.0.1:9/v1", model="m"))
    with pytest.raises(ServerError, match="gave no answer in 0.3 s"):
        gone.chat(ASKED, timeout_s=0.3)
    gone.close()
    for url, reason in (("", "has no url"), ("htp:/x", "is no URL|gave no answer")):
        with pytest.raises(ServerError, match=reason):
            Client(ServerConfig(url=url, model="m")).chat(ASKED, timeout_s=0.3)


def test_an_answer_of_another_shape_is_shown(server, client):
    server.fault = "odd"
    with pytest.raises(ServerError, match="answered something unexpected: .*choices"):
        client.chat(ASKED, timeout_s=5.0)


def test_many_requests_are_in_flight_at_once_and_no_more_than_allowed(server):
    server.fault = ("slow", 0.2)
    client = Client(ServerConfig(url=server.url, model="scripted"), at_once=8)
    replies = client.chat_all([[{"role": "user", "content": f"{i}"}] for i in range(24)], timeout_s=20.0, settings=[{}] * 24)
    assert [reply.text for reply in replies] == [f"{i}!" for i in range(24)]
    assert server.most_at_once == 8
    client.close()
    assert client.chat(ASKED, timeout_s=5.0).text == "?!", "a closed client opens anew"
    client.close()


def test_one_bad_request_among_many_fails_alone(server, client):
    server.chat = lambda messages, body: {"message": {"content": "fine"}} if messages[0]["content"] != "odd" else {"message": 3}
    good, bad = client.chat_all([ASKED, [{"role": "user", "content": "odd"}]], timeout_s=5.0, settings=[{}, {}])
    assert good.text == "fine" and isinstance(bad, ServerError)
    assert client.chat_all([], timeout_s=1.0, settings=[]) == []


def test_threads_share_a_client(server, client):
    said = {}
    threads = [
        threading.Thread(target=lambda i=i: said.update({i: client.complete(f"{i}", timeout_s=10.0).text})) for i in range(8)
    ]
    server.complete = lambda prompt, body: prompt * 2
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {i: f"{i}{i}" for i in range(8)}


def test_the_key_comes_from_the_environment(server, monkeypatch):
    server.key = "sesame"
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    cfg = ServerConfig(url=server.url.removesuffix("/v1") + "/", model="scripted", key_env="JUDGE_KEY")
    assert Client(cfg).chat(ASKED, timeout_s=5.0).text == "?!", "with or without /v1"
    monkeypatch.setenv("JUDGE_KEY", "wrong")
    with pytest.raises(ServerError, match="status 401"):
        Client(cfg).chat(ASKED, timeout_s=5.0)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ServerError, match="JUDGE_KEY"):
        Client(cfg)


def test_the_only_model_of_a_server_needs_no_name(server):
    assert Client(ServerConfig(url=server.url)).model() == "scripted"
    server.models = ("a", "b")
    with pytest.raises(ServerError, match=r"2 models \(a, b\)"):
        Client(ServerConfig(url=server.url)).model()
    with pytest.raises(ServerError, match="does not exist"):
        Client(ServerConfig(url=server.url, model="scripted")).chat(ASKED, timeout_s=5.0)


def test_greedy_next_is_the_argmax_after_every_position(server, client):
    server.next_token = lambda prefix: (sum(prefix) * 7 + len(prefix)) % 50
    sequences = [[3, 1, 4], [7], [5, 5, 5, 5, 2]]
    wanted_next = [[server.next_token(s[: i + 1]) for i in range(len(s))] for s in sequences]
    found = client.greedy_next([np.array(s) for s in sequences], timeout_s=5.0)
    assert [row.tolist() for row in found] == wanted_next and all(row.dtype == np.int32 for row in found)
    assert server.requests == {"/v1/completions": 1}, "one request for all"
    assert client.greedy_next([], timeout_s=5.0) == []
    with pytest.raises(ValueError, match="no tokens"):
        client.greedy_next([[1], []], timeout_s=5.0)


# as vLLM 0.32 answered for SmolLM2-135M-Instruct and the tokens of "The capital of France is"
RECORDED = {
    "index": 0, "text": " Paris", "logprobs": None, "finish_reason": "length", "stop_reason": None, "token_ids": [7042],
    "prompt_logprobs": [
        None,
        {"3575": {"logprob": -11.539274215698242, "rank": 2923, "decoded_token": " capital"},
         "29": {"logprob": -0.8654828071594238, "rank": 1, "decoded_token": "-"}},
        {"282": {"logprob": -0.3376066982746124, "rank": 1, "decoded_token": " of"}},
        {"4649": {"logprob": -2.4386610984802246, "rank": 2, "decoded_token": " France"},
         "260": {"logprob": -2.184504985809326, "rank": 1, "decoded_token": " the"}},
        {"314": {"logprob": -0.45092111825942993, "rank": 1, "decoded_token": " is"}},
    ],
    "prompt_token_ids": [504, 3575, 282, 4649, 314], "routed_experts": None,
}  # fmt: skip


def test_greedy_next_reads_what_vllm_answers(server, client, monkeypatch):
    monkeypatch.setattr(server, "_choice", lambda index, prompt, body: RECORDED)
    assert client.greedy_next([[504, 3575, 282, 4649, 314]], timeout_s=5.0)[0].tolist() == [29, 282, 260, 314, 7042]
    monkeypatch.setattr(server, "_choice", lambda *_: RECORDED | {"prompt_logprobs": None})
    with pytest.raises(ServerError, match="a guide must be a server of vLLM"):
        client.greedy_next([[504]], timeout_s=5.0)
    monkeypatch.setattr(server, "_choice", lambda *_: RECORDED)
    with pytest.raises(ServerError, match="5 positions for 2 tokens"):
        client.greedy_next([[504, 3575]], timeout_s=5.0)


@pytest.mark.parametrize("by", ["classify", "pooling", "score"])
def test_scores_of_reward_models(server, client, by):
    server.score = lambda prompt, response: len(prompt) - 10.0 * len(response)
    assert client.scores([("ab", "c"), ("a", "")], by=by, timeout_s=5.0) == [-8.0, 1.0]
    assert all(body["use_activation"] is False for body in server.asked)
    if by == "classify":
        assert client.scores([("ab", "c")], by=by, timeout_s=5.0, label=1) == [8.0]
        (error,) = client.scores([("ab", "c")], by=by, timeout_s=5.0, label=2)
        assert isinstance(error, ServerError)


def test_a_server_that_moves_is_found_again_and_the_time_does_not_count(server):
    with OpenAIServer(chat=lambda messages, body: "elsewhere") as other:
        places = [Address.of("http://127.0.0.1:9"), Address.of(other.url)]
        found = []

        def find() -> Address:
            time.sleep(1.5)
            found.append(places[min(len(found), 1)])
            return found[-1]

        moving = connection.Connection(find, "the server")
        body = {"model": "scripted", "messages": ASKED}
        answers = moving.ask_all("/v1/chat/completions", [body] * 5, 2.0)
        assert [a["choices"][0]["message"]["content"] for a in answers] == ["elsewhere"] * 5
        assert len(found) == 2, "five requests ask once each time"
        moving.close()


def test_an_answer_that_comes_as_the_wait_for_it_is_interrupted_counts():
    class Late(Future):
        def result(self, timeout=None):
            if not self.done():  # when it is looked at; a moment later it is
                raise TimeoutError(self.set_result(None))

    late = Late()
    connection.Connection(Address.of("http://x"), "the server")._wait(late, [], "/path", 5.0)
    assert late.done() and not late.cancelled()


def test_a_server_that_is_gone_for_good_is_not_waited_for():
    def find() -> Address:
        raise ServerError("its restarts are spent")

    gone = connection.Connection(find, "the server")
    assert [str(error) for error in gone.ask_all("/v1/chat/completions", [{}, {}], 30.0)] == ["its restarts are spent"] * 2


def test_answers_are_kept_in_memory_and_on_disk(tmp_path):
    first, second = AnswerCache(str(tmp_path)), AnswerCache(str(tmp_path))
    keys = [key_of("model", {"temperature": 0.0}, f"text {i}") for i in range(1200)]
    assert len(set(keys)) == 1200 and key_of({"b": 1, "a": 2}) == key_of({"a": 2, "b": 1})
    assert first.get(keys) == {}
    first.put({key: f"answer {i}" for i, key in enumerate(keys)})
    assert second.get([*keys, "unknown"]) == {key: f"answer {i}" for i, key in enumerate(keys)}
    assert (second.hits, second.misses, first.misses) == (1200, 1, 1200)
    second.close()
    assert second.get(keys[:1]) == {keys[0]: "answer 0"}, "from memory"


def test_memory_is_bounded_and_a_broken_file_only_warns(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "IN_MEMORY", 3)
    small = AnswerCache()
    small.put({f"{i}": "x" for i in range(5)})
    assert list(small.get(map(str, range(5)))) == ["2", "3", "4"]
    kept = AnswerCache(str(tmp_path))
    kept.close()
    next(tmp_path.glob("*.sqlite")).write_bytes(b"this is no database" * 100)
    broken = AnswerCache(str(tmp_path))
    broken.put({"a": "b"})
    assert broken.get(["a"]) == {"a": "b"}
    assert sum("in memory only" in record.message for record in caplog.records) == 1


def test_processes_share_the_file(tmp_path):
    code = (
        "import sys; from rlpipe.serving.cache import AnswerCache; cache = AnswerCache(sys.argv[1])\n"
        "for i in range(100): cache.put({f'{sys.argv[2]}-{i}': 'x'})\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert len(AnswerCache(str(tmp_path)).get(f"{name}-{i}" for name in "abc" for i in range(100))) == 300


def test_the_command_line_of_a_server(monkeypatch):
    args = {"max-model-len": 4096, "--enforce_eager": True, "quantization": None, "hf-overrides": {"a": 1}, "x": ["p", "q"]}
    words = engine.command(ServerConfig(model="m", gpus=2.0, args=args), "10.0.0.1", 8001, "/there/python")
    assert words == [
        "/there/python", "-m", engine.MODULE, "--model", "m", "--host", "10.0.0.1", "--port", "8001",
        "--generation-config", "vllm", "--disable-uvicorn-access-log", "--tensor-parallel-size", "2", "--max-model-len", "4096",
        "--enforce-eager", "--hf-overrides", '{"a": 1}', "--x", "p", "q",
    ]  # fmt: skip
    monkeypatch.delenv(engine.PYTHON_ENV, raising=False)
    if engine.importlib.util.find_spec("vllm") is None:
        with pytest.raises(ServerError, match="needs vLLM, which is not installed here"):
            engine.command(ServerConfig(model="m"), "h", 1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, what: str, timeout_s: float = 30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def started_pids(file: Path) -> list[int]:
    until(lambda: file.exists() and len(file.read_text().split()) == 2, "the command to start")
    return [int(word) for word in file.read_text().split()]


GRANDCHILD = (
    "import os, subprocess, sys, time; child = subprocess.Popen(['sleep', '600'])\n"
    "open(sys.argv[1] + '.new', 'w').write(f'{os.getpid()} {child.pid}'); os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
    "time.sleep(float(sys.argv[2])); sys.exit(7)\n"
)


@pytest.mark.parametrize("ending", ["the owner dies", "terminated", "owner and leash are killed", "by itself"])
def test_a_command_on_a_leash_ends_with_all_it_has_started(tmp_path, ending):
    pids = tmp_path / "pids"
    seconds = "0.2" if ending == "by itself" else "600"
    command = [sys.executable, "-I", "-S", leash.__file__, sys.executable, "-c", GRANDCHILD, str(pids), seconds]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    started = started_pids(pids)
    if ending == "terminated":
        process.terminate()
    elif ending == "owner and leash are killed":  # as Ray does: an actor and its children
        process.kill()
    if ending in ("the owner dies", "owner and leash are killed"):
        process.stdin.close()  # as the system does with what a dead process had open
    code = process.wait(30)
    until(lambda: not any(map(alive, started)), "the command and what it has started to end")
    killed = -signal.SIGKILL if ending == "owner and leash are killed" else 128 + signal.SIGKILL
    assert code == (7 if ending == "by itself" else killed)
    process.stdin.close()


FAKE_VLLM = """
import os, subprocess, sys, time
sys.path.insert(0, {tests!r})
from openai_server import OpenAIServer
host, port = (sys.argv[sys.argv.index(name) + 1] for name in ("--host", "--port"))
print("loading", sys.argv[sys.argv.index("--model") + 1], flush=True)
if "--broken" in sys.argv:
    sys.exit("no such architecture")
key = os.environ["VLLM_API_KEY"]
child = subprocess.Popen(["sleep", "600"])  # an engine has processes of its own
with OpenAIServer(chat=lambda m, b: f"{{os.getpid()}} {{child.pid}}", host=host, port=int(port), models=("m",), key=key):
    time.sleep(600)
"""


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """A `python` that answers `-m vllm…` with the scripted server."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE_VLLM.format(tests=str(Path(__file__).parent)))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(engine.PYTHON_ENV, str(python))


def options(role: str, index: int) -> dict:
    return {"num_cpus": 0.1, "num_gpus": 0}


def test_servers_are_started_found_restarted_and_ended(ray_session, fake_vllm, tmp_path):
    cfg = RunConfig(judge=ServerConfig(model="m", gpus=0, start_timeout_s=60.0), guide=ServerConfig(url="http://there/v1"))
    assert list(wanted(cfg)) == ["judge"]
    servers = Servers(cfg, tmp_path / "run", options)
    try:
        servers.wait()
        assert servers.config("guide") == cfg.guide
        assert servers.config("judge").url.startswith("ray:rlpipe-judge-run-")
        assert servers.settled() == replace(cfg, judge=servers.config("judge")) and not wanted(servers.settled())
        client = Client(servers.config("judge"), "the judge's server")
        first, firsts_own = map(int, client.chat(ASKED, timeout_s=10.0).text.split())
        until(lambda: servers.metrics() == {"cluster/judge_restarts": 0.0} and servers._pids["judge"][1], "its first pid")
        os.kill(first, signal.SIGKILL)
        second, seconds_own = map(int, client.chat(ASKED, timeout_s=10.0).text.split())
        assert second != first and not alive(first) and not alive(firsts_own)
        until(lambda: servers.metrics() == {"cluster/judge_restarts": 1.0}, "the restart to be counted")
        assert (tmp_path / "run/servers/judge.log").read_text().count("loading m") == 2
    finally:
        servers.close()
    until(lambda: not alive(second) and not alive(seconds_own), "the engine and its own to end with the actor")
    with pytest.raises(ServerError, match="is gone"):
        client.chat(ASKED, timeout_s=10.0)
    client.close()


def test_a_server_that_cannot_start_says_why_at_once(ray_session, fake_vllm, tmp_path, monkeypatch):
    broken = ServerConfig(model="m", gpus=0, args={"broken": True}, start_timeout_s=60.0)
    servers = Servers(RunConfig(judge=broken), tmp_path / "run", options)
    with pytest.raises(ServerError, match="(?s)ended with code 1 before it answered.*no such architecture"):
        servers.wait()
    servers.close()
    monkeypatch.setenv(engine.PYTHON_ENV, str(tmp_path / "nothing"))
    servers = Servers(RunConfig(guide=ServerConfig(model="m", gpus=0, start_timeout_s=60.0)), tmp_path / "run", options)
    with pytest.raises(ServerError, match="ended with code|cannot be started"):
        servers.wait()
    servers.close()


@pytest.mark.parametrize(
    "cfg, message",
    [
        (RunConfig(verifier=VerifierConfig(name="llm_judge")), "judge.url=http"),
        (RunConfig(verifier=VerifierConfig(parts={"math": 1.0, "reward_model": 0.1})), "verifier reward_model asks a server"),
        (RunConfig(judge=ServerConfig(url="localhost:8000")), "http://HOST:8000/v1"),
        (RunConfig(guide=ServerConfig(url="http://there", args={"x": 1})), "guide.args are of a server that the run starts"),
        (RunConfig(judge=ServerConfig(model="m", gpus=1.5)), "whole GPUs, or a share of one"),
    ],
)
def test_what_a_recipe_must_not_say_of_servers(cfg, message):
    with pytest.raises(ConfigError, match=message):
        check_servers(cfg)
    check_servers(RunConfig(verifier=VerifierConfig(name="llm_judge"), judge=ServerConfig(model="m", gpus=0.5)))
