"""A generate function whose responses have exactly --rollout-max-response-len tokens, whatever the model says."""

from argparse import Namespace
from typing import Any

from slime.rollout.sglang_rollout import generate as generate_by_engine
from slime.utils.types import Sample


async def generate(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """The default generation, in which no token ends a response."""
    return await generate_by_engine(args, sample, sampling_params | {"ignore_eos": True})
