"""A generate function that streams, so that a sample grows as its tokens arrive and an abort loses none of them.

Use it with `--custom-generate-function-path slime.rollout.sglang_streaming_rollout.generate_streaming`.
"""

import copy
from argparse import Namespace
from contextlib import aclosing
from typing import Any

from slime.rollout import sglang_rollout
from slime.rollout.engine_requests import prepare_request, take_reply
from slime.rollout.staleness import weight_clock
from slime.utils.http_utils import stream_post
from slime.utils.types import Sample


async def generate_streaming(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """One call of the engine, like `sglang_rollout.generate`, that stops reading when the rollout is aborted."""
    state = sglang_rollout.GenerateState(args)
    request = prepare_request(args, sample, sampling_params, state.tokenizer, state.processor)
    if request is None:
        return sample
    before, version = copy.copy(vars(sample)), weight_clock().current
    finish_reason = None
    url = sglang_rollout.get_model_url(args)
    async with aclosing(stream_post(url, request.payload | {"stream": True}, headers=request.headers)) as events:
        async for reply in events:
            if "error" in reply:
                raise RuntimeError(
                    f"POST {url} (streaming), sample {sample.index}: the engine ended with {reply['error']}"
                )
            # Each event holds everything since the request began: start again from the state before it.
            _reset(sample, before)
            take_reply(args, sample, reply, version)
            finish_reason = reply["meta_info"]["finish_reason"]
            if state.aborted:
                break
    if not finish_reason:
        if not state.aborted:
            raise ConnectionError(
                f"POST {url} (streaming): the stream ended before the response of sample {sample.index}."
            )
        sample.status = Sample.Status.ABORTED
    return sample


def _reset(sample: Sample, before: dict[str, Any]) -> None:
    vars(sample).clear()
    vars(sample).update(before)
    sample.spec_info = copy.copy(before["spec_info"])
    sample.prefix_cache_info = copy.copy(before["prefix_cache_info"])
