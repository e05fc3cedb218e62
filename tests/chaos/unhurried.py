"""A generate function that takes its time, for tests that have to meet a run while it generates."""

import asyncio
from argparse import Namespace
from typing import Any

from slime.rollout.sglang_rollout import generate as generate_by_engine
from slime.utils.types import Sample

WAIT_S = 2.0


async def generate(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """The default generation, some seconds late."""
    await asyncio.sleep(WAIT_S)
    return await generate_by_engine(args, sample, sampling_params)
