"""A small OpenAI-compatible server in this process, as vLLM answers, with scripted texts and scripted faults."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web

SOON_S = 20.0


class OpenAIServer:
    """A context; `url` ends in /v1.

    chat(messages, body) → text, or a dict of a whole choice · next_token(prefix) → id: the model's likeliest next token, for
    completions of token ids and their prompt_logprobs · complete(prompt, body) → text · score(prompt, response) → number.
    faults: what the next requests meet, one each; fault: what all others meet: an HTTP status · "drop" the connection ·
    "broken" JSON · "odd" JSON · "hang" for ever · ("slow", seconds) · ("429", seconds to wait). Counters: requests by path,
    most_at_once; asked: all bodies; key: the bearer token it wants.
    """

    def __init__(
        self,
        chat: Callable[..., Any] = lambda messages, body: "Verdict: CORRECT",
        next_token: Callable[[Sequence[int]], int] = lambda prefix: 0,
        complete: Callable[..., str] = lambda prompt, body: "",
        score: Callable[[str, str], float] = lambda prompt, response: 0.0,
        models: Sequence[str] = ("scripted",),
        key: str = "",
        port: int = 0,
        host: str = "127.0.0.1",
    ):
        self.chat, self.next_token, self.complete, self.score = chat, next_token, complete, score
        self.models, self.key, self.port = models, key, port
        self.host = host
        self.faults: list[Any] = []
        self.fault: Any = None
        self.requests: dict[str, int] = {}
        self.asked: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0

    def __enter__(self) -> OpenAIServer:
        self.loop, ready = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self.thread.start()
        assert ready.wait(SOON_S)
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(SOON_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(SOON_S)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._start())
        ready.set()
        self.loop.run_forever()
        self.loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**28)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/{path:.*}", self._handle)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self.runner.setup()
        site = web.TCPSite(self.runner, self.host, self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path, body = request.path, await request.json()
        self.requests[path] = self.requests.get(path, 0) + 1
        self.asked.append(body)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            fault = self.faults.pop(0) if self.faults else self.fault
            spoiled = await self._spoil(fault, request)
            if spoiled is not None:
                return spoiled
            if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
                return web.json_response({"error": "Unauthorized"}, status=401)
            if body.get("model") not in self.models:
                return web.json_response({"error": {"message": f"The model `{body.get('model')}` does not exist."}}, status=404)
            return web.json_response(self._answer(path, body))
        finally:
            self.at_once -= 1

    async def _spoil(self, fault: Any, request: web.Request) -> web.Response | None:
        if isinstance(fault, tuple) and fault[0] == "slow":
            await asyncio.sleep(fault[1])
            return None
        if isinstance(fault, tuple):
            return web.Response(status=int(fault[0]), headers={"Retry-After": str(fault[1])})
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "drop":
            request.transport.close()
        if fault == "odd":
            return web.json_response({"choices": [{"message": {}}]})
        if isinstance(fault, int):
            return web.json_response({"error": {"message": f"scripted {fault}"}}, status=fault)
        return web.Response(text='{"choices": [{"mess') if fault in ("broken", "drop") else None

    def _answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/chat/completions":
            said = self.chat(body["messages"], body)
            choice = said if isinstance(said, dict) else {"message": {"role": "assistant", "content": said}}
            return {"object": "chat.completion", "choices": [{"index": 0, "finish_reason": "stop"} | choice]}
        if path == "/v1/completions":
            prompts = body["prompt"]
            many = prompts if isinstance(prompts, list) and not isinstance(prompts[0], int) else [prompts]
            return {"choices": [self._choice(index, prompt, body) for index, prompt in enumerate(many)]}
        if path == "/score":
            number = self.score(body["text_1"], body["text_2"])
            return {"data": [{"index": 0, "object": "score", "score": number}]}
        turns = [message["content"] for message in body["messages"]]
        number = self.score(*turns)
        if path == "/classify":
            return {"data": [{"index": 0, "label": "LABEL_0", "probs": [number, -number], "num_classes": 2}]}
        assert path == "/pooling", path
        return {"data": [{"index": 0, "object": "pooling", "data": [[0.0], [number]]}]}

    def _choice(self, index: int, prompt: Any, body: dict[str, Any]) -> dict[str, Any]:
        if isinstance(prompt, str):
            return {"index": index, "text": self.complete(prompt, body), "finish_reason": "stop"}
        choice: dict[str, Any] = {"index": index, "text": "?", "finish_reason": "length"}
        if body.get("return_token_ids"):
            choice["token_ids"] = [self.next_token(prompt)]
        if body.get("prompt_logprobs"):
            choice["prompt_logprobs"] = [None, *(self._position(prompt, i) for i in range(1, len(prompt)))]
        return choice

    def _position(self, prompt: list[int], place: int) -> dict[str, Any]:
        """As vLLM: the token that stands there, and the likeliest."""
        likeliest, there = self.next_token(prompt[:place]), prompt[place]
        entry = {str(there): {"logprob": -9.0, "rank": 7, "decoded_token": "?"}}
        return entry | {str(likeliest): {"logprob": -0.5, "rank": 1, "decoded_token": "?"}}
