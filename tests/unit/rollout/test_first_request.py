"""When requests leave: an engine has the first ones while the last are still being made."""

import asyncio
import json
from urllib.parse import urlsplit

from slime.rollout import sglang_rollout
from slime.rollout.data_source import load_data_source
from slime.rollout.sglang_rollout import generate_rollout_async
from tests.raw_http import answer, read_request, serving
from tests.unit.rollout import fakes

NUM_GROUPS = 60


async def test_the_engine_has_requests_before_all_prompts_are_tokens(make_args, prompts, monkeypatch) -> None:
    num_encoded, seen_at_arrival = 0, []

    class CountingTokenizer(fakes.FakeTokenizer):
        def encode(self, text, add_special_tokens=True):
            nonlocal num_encoded
            num_encoded += 1
            return super().encode(text, add_special_tokens)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        seen_at_arrival.append(num_encoded)
        reply = fakes.FakeEngine().reply(len(seen_at_arrival), "ok", {"type": "stop"}, 8)
        writer.write(answer(200, json.dumps(reply).encode()))

    monkeypatch.setattr(sglang_rollout, "load_tokenizer", lambda path, **kwargs: CountingTokenizer())
    async with serving(handle) as url:
        args = make_args(
            prompt_data=prompts(*(f"prompt {i}" for i in range(NUM_GROUPS))),
            sglang_router_ip=urlsplit(url).hostname,
            sglang_router_port=urlsplit(url).port,
            rollout_batch_size=NUM_GROUPS,
            over_sampling_batch_size=NUM_GROUPS,
            n_samples_per_prompt=1,
        )
        output, _ = await generate_rollout_async(args, 0, load_data_source(args).get_samples)
    assert len(output.samples) == len(seen_at_arrival) == num_encoded == NUM_GROUPS
    assert seen_at_arrival[0] < NUM_GROUPS
