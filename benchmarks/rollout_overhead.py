"""What slime itself adds to a rollout: seconds before the engine has requests, and after it has sent all replies.

    python benchmarks/rollout_overhead.py --model FOLDER --prompts data/gsm8k/train.jsonl

The engine is a stand-in that speaks SGLang's protocol: it waits until all requests of a rollout are there, holds them
for --hold seconds, and answers, all at once or over --spread seconds, with log-probs of --tokens tokens. The rollout
has everything on: chat template, router, rewards, samples on disk. The reference sends the same requests with one bare
aiohttp client straight to the stand-in and parses the replies.
"""

import argparse
import asyncio
import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import orjson
from aiohttp import web

sys.path.insert(0, str(Path(__file__).parents[1]))

_ARRIVALS = ("first_request", "last_request")
ANSWERS = ("so the answer is \\boxed{18}", "which gives \\boxed{\\frac{36}{2}} in all", "I do not know")


class StandIn:
    """Answers `/generate` for whole rollouts at a time, and tells when requests came and replies went."""

    def __init__(self, options: Namespace) -> None:
        self._options = options
        self._num_requests = options.batch * options.samples
        self._arrived = 0
        self._replied = 0
        self._times: dict[str, float] = {}
        self._release = asyncio.Event()
        draw = random.Random(0)
        tokens = [[round(-draw.random(), 6), draw.randrange(1000, 30000), None] for _ in range(options.tokens)]
        self._tokens = orjson.dumps(tokens)
        self._words = "the price of each one is three more than before " * (options.tokens // 10)

    async def generate(self, request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        if self._arrived == 0:
            self._release = asyncio.Event()
            self._times = {"first_request": time.time()}
        release = self._release
        number, self._arrived = self._arrived, self._arrived + 1
        if self._arrived == self._num_requests:
            self._times["last_request"] = time.time()
            await asyncio.sleep(self._options.hold)
            self._times["first_reply"] = time.time()
            self._arrived = self._replied = 0
            release.set()
        await release.wait()
        await asyncio.sleep(self._options.spread * number / self._num_requests)
        self._replied += 1
        if self._replied == self._num_requests:
            self._times["last_reply"] = time.time()
        return web.Response(body=self._reply(number, len(body["input_ids"])), content_type="application/json")

    def _reply(self, number: int, prompt_tokens: int) -> bytes:
        meta = {
            "id": f"request-{number}", "finish_reason": {"type": "stop", "matched": 2}, "weight_version": "default",
            "prompt_tokens": prompt_tokens, "completion_tokens": self._options.tokens, "cached_tokens": 0,
            "e2e_latency": self._options.hold,
        }  # fmt: skip
        text = self._words + ANSWERS[number % len(ANSWERS)]
        whole = orjson.dumps({"text": text, "meta_info": meta})
        return whole[:-2] + b',"output_token_logprobs":' + self._tokens + b"}}"

    async def times(self, _: web.Request) -> web.Response:
        return web.json_response(self._times)

    async def info(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"version": "0.5.16", "model_path": self._options.model, "tp_size": 1, "device": "cpu"}
        )

    async def loads(self, _: web.Request) -> web.Response:
        return web.json_response({"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0}]})

    async def ok(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/generate", self.generate)
        app.router.add_get("/times", self.times)
        app.router.add_get("/v1/loads", self.loads)
        for path in ("/server_info", "/get_server_info", "/model_info", "/get_model_info"):
            app.router.add_get(path, self.info)
        app.router.add_get("/health", self.ok)
        app.router.add_route("*", "/{rest:.*}", self.ok)
        return app


def main() -> None:
    options = _options()
    if options.serve:
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # the router tries other protocols first
        web.run_app(StandIn(options).app(), host="127.0.0.1", port=options.serve, print=None, access_log=None)
        return
    from slime.utils.processes import free_port

    port = free_port()
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(port), *sys.argv[1:]])
    try:
        ours, requests = _through_slime(options, port)
        bare = [asyncio.run(_bare(port, requests)) for _ in range(options.rollouts + 1)][1:]
    finally:
        server.terminate()
        server.wait()
    print(
        f"\n{options.batch} x {options.samples} requests, {options.tokens} tokens each, medians of {options.rollouts}"
    )
    print("| way | s before the first request | the last | s after the last reply | the last two | of a rollout |")
    print("|---|---|---|---|---|---|")
    for way, rows in {"slime, everything on": ours, "bare aiohttp client, no router": bare}.items():
        first, last, after = (statistics.median(row[i] for row in rows) for i in range(3))
        added = last + after
        share = added / (added + options.hold + options.spread)
        print(f"| {way} | {first:.3f} | {last:.3f} | {after:.3f} | {added:.3f} | {share:.1%} |")


def _options() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="HuggingFace folder; its tokenizer and config are read")
    parser.add_argument("--prompts", required=True, help="JSON lines with `prompt` and `label`")
    parser.add_argument("--tokens", type=int, default=400, help="of each response")
    parser.add_argument("--batch", type=int, default=32, help="prompts a rollout")
    parser.add_argument("--samples", type=int, default=8, help="responses a prompt")
    parser.add_argument("--rollouts", type=int, default=5, help="that count")
    parser.add_argument("--hold", type=float, default=2.3, help="seconds of generation (default: 2.3)")
    parser.add_argument(
        "--spread", type=float, default=0.0, help="seconds from the first reply to the last (default: 0)"
    )
    parser.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="more flags of train.py, after --")
    return parser.parse_args()


def _times(port: int) -> dict[str, float]:
    return dict(httpx.get(f"http://127.0.0.1:{port}/times", trust_env=False).json())


def _through_slime(options: Namespace, port: int) -> tuple[list[tuple[float, float, float]], list[bytes]]:
    """Seconds before the first and the last request and after the last reply of each rollout that counts, and the
    bodies of one rollout's requests."""
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [
            "train.py", "--hf-checkpoint", options.model, "--debug-rollout-only", "--rollout-engine", "sglang",
            "--rollout-external-engine-addrs", f"127.0.0.1:{port}", "--device", "cpu",
            "--prompt-data", options.prompts, "--input-key", "prompt", "--label-key", "label", "--apply-chat-template",
            "--rm-type", "math", "--num-rollout", str(options.rollouts + 1),
            "--rollout-batch-size", str(options.batch), "--n-samples-per-prompt", str(options.samples),
            "--rollout-max-response-len", str(options.tokens), "--output-dir", folder, "--run-name", "overhead",
            *options.flags,
        ]  # fmt: skip
        from slime.arguments import parse_args
        from slime.ray.run import Run

        args = parse_args()
        rows = []
        with Run(args) as run:
            for rollout_id in range(options.rollouts + 1):
                with run.step(rollout_id):
                    began = time.time()
                    run.generate(rollout_id)
                    ended = time.time()
                times = _times(port)
                first, last = (times[which] - began for which in _ARRIVALS)
                rows.append((first, last, ended - times["last_reply"]))
        samples = Path(args.run_dir) / "samples" / f"rollout_{options.rollouts:06d}.jsonl"
        texts = [json.loads(line)["prompt"] for line in samples.read_text().splitlines()]
    from slime.utils.processing_utils import load_tokenizer

    tokenizer = load_tokenizer(options.model)
    bodies = [
        orjson.dumps({
            "input_ids": tokenizer.encode(text, add_special_tokens=False), "return_logprob": True,
            "sampling_params": {"max_new_tokens": options.tokens, "temperature": 1.0},
        })
        for text in texts
    ]  # fmt: skip
    return rows[1:], bodies


async def _bare(port: int, bodies: list[bytes]) -> tuple[float, float, float]:
    async def one(client: aiohttp.ClientSession, body: bytes) -> Any:
        async with client.post(f"http://127.0.0.1:{port}/generate", data=body) as reply:
            return orjson.loads(await reply.read())

    began = time.time()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        await asyncio.gather(*(one(client, body) for body in bodies))
    ended = time.time()
    times = await asyncio.to_thread(_times, port)
    first, last = (times[which] - began for which in _ARRIVALS)
    return first, last, ended - times["last_reply"]


if __name__ == "__main__":
    main()
