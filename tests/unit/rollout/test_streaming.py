"""The streaming generate function: cumulative events, aborts in mid-stream, broken streams."""

import json

import httpx
import pytest

from slime.rollout.sampling import rollout_sampling_params
from slime.rollout.sglang_rollout import GenerateState
from slime.rollout.sglang_streaming_rollout import generate_streaming
from slime.utils import http_utils
from slime.utils.types import Sample

PARTS = [("a", None), ("ab", None), ("abc", {"type": "stop"})]


@pytest.fixture
def stream(engine, monkeypatch):
    """Serves the given parts as events; `before(i)` is called ahead of each."""

    def install(parts, before=lambda i: None, done=True):
        async def body():
            for i, (text, finish) in enumerate(parts):
                before(i)
                yield f"data: {json.dumps(engine.reply(0, text, finish, 2))}\n\n".encode()
            if done:
                yield b"data: [DONE]\n\n"

        def handle(request):
            assert json.loads(request.content)["stream"] is True
            return httpx.Response(200, content=body())

        monkeypatch.setattr(http_utils, "_http_client", httpx.AsyncClient(transport=httpx.MockTransport(handle)))

    return install


async def test_events_that_repeat_what_came_before_count_once(stream, make_args):
    stream(PARTS)
    args = make_args()
    sample = await generate_streaming(args, Sample(prompt="hi"), rollout_sampling_params(args))
    assert (sample.response, sample.response_length, sample.status) == ("abc", 3, Sample.Status.COMPLETED)
    assert sample.tokens == [ord(c) for c in "hiabc"]
    assert sample.rollout_log_probs == [-0.5] * 3
    assert sample.weight_versions == ["1"]
    assert sample.prefix_cache_info.total_prompt_tokens == 2


async def test_a_response_begun_before_is_continued(stream, make_args):
    stream(PARTS)
    args = make_args()
    sample = Sample(prompt="hi", tokens=[104, 105])
    sample.append_response_tokens(tokens=[120], log_probs=[-1.0], text="x")
    await generate_streaming(args, sample, rollout_sampling_params(args))
    assert (sample.response, sample.rollout_log_probs) == ("xabc", [-1.0] + [-0.5] * 3)


async def test_an_abort_keeps_the_tokens_that_arrived(stream, make_args):
    args = make_args()

    def abort_before_the_third(i):
        if i == 1:
            GenerateState(args).aborted = True
        assert i < 2, "read on after the abort"

    stream(PARTS, abort_before_the_third)
    sample = await generate_streaming(args, Sample(prompt="hi"), rollout_sampling_params(args))
    assert (sample.response, sample.status) == ("ab", Sample.Status.ABORTED)


async def test_a_stream_that_breaks_off_is_an_error(stream, make_args):
    stream(PARTS[:2], done=False)
    args = make_args()
    with pytest.raises(ConnectionError, match="ended before the response of sample 6"):
        await generate_streaming(args, Sample(prompt="hi", index=6), rollout_sampling_params(args))
