"""Stand-ins for a tokenizer and for engines behind a router, small enough to read at a glance."""

import asyncio
import json
import re

import httpx

HOST, PORT = "router.test", 3000
ROUTER = f"http://{HOST}:{PORT}"
WORKER = "http://worker.test:1"


class FakeTokenizer:
    """One token a character; a message is `<role>text</>`."""

    name_or_path = "fake"
    chat_template = "fake"
    roles = ("system", "user", "assistant", "tool")

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return [ord(character) for character in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def __call__(self, texts, add_special_tokens=True):
        if isinstance(texts, str):
            return {"input_ids": self.encode(texts, add_special_tokens)}
        return {"input_ids": [self.encode(text, add_special_tokens) for text in texts]}

    def apply_chat_template(self, messages, tools=None, tokenize=True, add_generation_prompt=False):
        assert not tokenize
        text = f"<tools>{json.dumps(tools)}</>" if tools else ""
        for message in messages:
            if message["role"] not in self.roles:
                raise ValueError(f"unknown role {message['role']}")
            text += f"<{message['role']}>{message['content']}</>"
        return text + ("<assistant>" if add_generation_prompt else "")


class FakeEngine:
    """A router with one engine: answers `ok` unless the prompt asks for something else.

    A prompt may hold `say:word`, `fail:status` (the first time it is seen), `slow` (answers only when aborted, with the
    first letter of its word) and `wait:n` (answers after n others did).
    """

    def __init__(self):
        self.requests = []
        self.headers = []
        self.num_aborts = 0
        self.running = {}
        self.num_answered = 0
        self.failed = set()
        self.weight_version = "1"
        self.change_reply = lambda reply: reply

    def client(self):
        return httpx.AsyncClient(transport=httpx.MockTransport(self._handle))

    async def _handle(self, request):
        path = request.url.path
        if path == "/workers":
            return httpx.Response(200, json={"workers": [{"id": "w", "url": WORKER}]})
        if path == "/abort_request":
            self.num_aborts += 1
            for aborted in self.running.values():
                aborted.set()
            return httpx.Response(200)
        if path == "/v1/loads":
            return httpx.Response(200, json={"loads": [{"num_running_reqs": len(self.running), "num_waiting_reqs": 0}]})
        assert path == "/generate", path
        self.headers.append(request.headers)
        return await self._generate(json.loads(request.content))

    async def _generate(self, payload):
        number = len(self.requests)
        self.requests.append(payload)
        text = payload["text"] if "text" in payload else "".join(map(chr, payload["input_ids"]))
        failure = re.search(r"fail:(\d+)", text)
        if failure and text not in self.failed:
            self.failed.add(text)
            return httpx.Response(int(failure[1]), text="the engine says no")
        word = said[1] if (said := re.search(r"say:(\w+)", text)) else "ok"
        finish = {"type": "stop"}
        aborted = self.running[number] = asyncio.Event()
        if "slow" in text:
            await aborted.wait()
            word, finish = word[:1], {"type": "abort", "message": "Aborted"}
        elif wait := re.search(r"wait:(\d+)", text):
            while self.num_answered < int(wait[1]):
                await asyncio.sleep(0)
        del self.running[number]
        self.num_answered += 1
        word = word[: payload["sampling_params"]["max_new_tokens"]]
        return httpx.Response(200, json=self.change_reply(self.reply(number, word, finish, len(text))))

    def reply(self, number, word, finish, prompt_tokens):
        return {
            "text": word,
            "output_ids": [ord(character) for character in word],
            "meta_info": {
                "id": f"request-{number}",
                "finish_reason": finish,
                "output_token_logprobs": [[-0.5, ord(character), None] for character in word],
                "prompt_tokens": prompt_tokens,
                "completion_tokens": len(word),
                "cached_tokens": 0,
                "weight_version": self.weight_version,
            },
        }
