"""Plug-ins as users keep them in folders of their own, written against nothing but the documented names."""

import asyncio

import pytest

from slime.rollout.base_types import call_rollout_fn
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.rollout.sampling import rollout_sampling_params
from slime.rollout.sglang_rollout import generate_and_rm, generate_rollout
from slime.utils.eval_config import EvalDatasetConfig
from slime.utils.misc import load_function
from slime.utils.types import Sample
from tests.unit.rollout.conftest import clean_slate, engine, make_args, prompts

__all__ = ["clean_slate", "engine", "make_args", "prompts"]  # fixtures

SEARCH_AGENT = '''
"""Multi-turn with a search tool: prompts as text, tokens, mask and log-probs counted by hand."""
import asyncio

from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample

CONFIGS = {"max_turns": 2, "search_concurrency": 2}
SEMAPHORE = asyncio.Semaphore(CONFIGS["search_concurrency"])


async def execute(response):
    async with SEMAPHORE:
        await asyncio.sleep(0)
    return "[found]"


async def generate(args, sample: Sample, sampling_params) -> Sample:
    assert not args.partial_rollout
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt_tokens = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    response, tokens, mask, log_probs = "", [], [], []
    for _ in range(CONFIGS["max_turns"]):
        payload = {"text": sample.prompt + response, "sampling_params": sampling_params, "return_logprob": True}
        output = await post(url, payload)
        if output["meta_info"]["finish_reason"]["type"] == "abort":
            sample.status = Sample.Status.ABORTED
            return sample
        made = output["meta_info"]["output_token_logprobs"]
        response += output["text"]
        tokens += [item[1] for item in made]
        log_probs += [item[0] for item in made]
        mask += [1] * len(made)
        found = await execute(response)
        found_tokens = state.tokenizer(found, add_special_tokens=False)["input_ids"]
        response += found
        tokens += found_tokens
        log_probs += [0.0] * len(found_tokens)
        mask += [0] * len(found_tokens)
    sample.tokens = prompt_tokens + tokens
    sample.response_length = len(tokens)
    sample.response = response
    sample.loss_mask = mask
    sample.rollout_log_probs = log_probs
    match output["meta_info"]["finish_reason"]["type"]:
        case "length":
            sample.status = Sample.Status.TRUNCATED
        case "stop":
            sample.status = Sample.Status.COMPLETED
    return sample


async def reward_func(args, sample, **kwargs):
    if not isinstance(sample, Sample):
        raise TypeError("not a Sample")
    return {"score": float(sample.response.endswith("[found]")), "acc": 0.0}
'''

OWN_WORKER = '''
"""A rollout function that keeps groups in flight on an event loop in a thread of its own."""
import asyncio
import queue
import threading

from slime.rollout.sglang_rollout import GenerateState, generate_and_rm_group
from slime.utils.async_utils import run
from slime.utils.types import Sample

_worker = None


class Worker:
    def __init__(self, args, data_buffer, concurrency):
        self.args, self.data_buffer, self.concurrency = args, data_buffer, concurrency
        self.running, self.done = True, queue.Queue()
        self.state = GenerateState(args)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.loop()), daemon=True)

    async def loop(self):
        active = set()
        while self.running:
            active = {task for task in active if not task.done()}
            while len(active) < self.concurrency:
                (group,) = self.data_buffer.get_samples(1)
                params = self.state.sampling_params.copy()
                made = generate_and_rm_group(self.args, group, sampling_params=params, evaluation=False)
                task = asyncio.create_task(made)
                task.add_done_callback(lambda task: self.done.put(task.result()))
                active.add(task)
            await asyncio.sleep(0.01)
        await asyncio.gather(*active)


async def collect(args, data_buffer):
    global _worker
    if _worker is None:
        _worker = Worker(args, data_buffer, concurrency=3)
        _worker.thread.start()
    groups = []
    while len(groups) < args.rollout_batch_size:
        try:
            group = _worker.done.get_nowait()
        except queue.Empty:
            await asyncio.sleep(0.01)
            continue
        if any(sample.status == Sample.Status.ABORTED for sample in group):
            data_buffer.add_samples([group])
        else:
            groups.append(group)
    return sorted(groups, key=lambda group: group[0].index)


def stop():
    _worker.running = False
    _worker.thread.join(10)


def generate_rollout(args, rollout_id, data_buffer, evaluation=False):
    if evaluation:
        raise ValueError("not here")
    return run(collect(args, data_buffer))
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder on PYTHONPATH."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


async def test_a_search_agent_that_counts_its_own_tokens(engine, make_args, folder):
    (folder / "generate_with_search.py").write_text(SEARCH_AGENT)
    args = make_args(
        custom_generate_function_path="generate_with_search.generate",
        custom_rm_path="generate_with_search.reward_func",
        reward_key="score",
    )
    sample = await generate_and_rm(args, Sample(prompt="why", label="ok"), rollout_sampling_params(args))
    assert sample.response == "ok[found]ok[found]"
    assert sample.loss_mask == [1, 1, *[0] * 7] * 2
    assert sample.rollout_log_probs == [-0.5, -0.5, *[0.0] * 7] * 2
    assert bytes(sample.tokens).decode() == "why" + sample.response
    assert (sample.get_reward_value(args), sample.status) == (1.0, Sample.Status.COMPLETED)


def test_a_worker_with_a_loop_of_its_own_beside_evaluations_on_slimes(engine, make_args, prompts, folder, monkeypatch):
    """Groups of the worker and of an evaluation are in flight on two event loops, and wait for their turn on both."""
    (folder / "own_worker.py").write_text(OWN_WORKER)
    held = prompts(*("say:ok",) * 5, name="held.jsonl")
    task = EvalDatasetConfig("held", held, input_key="prompt", label_key="label", max_response_len=8)
    args = make_args(prompt_data=prompts("a", "b", "c"), eval_datasets=[task], sglang_server_concurrency=1)
    monkeypatch.setattr(engine, "_generate", delayed(engine._generate))
    source = RolloutDataSourceWithBuffer(args)
    function = load_function("own_worker.generate_rollout")
    try:
        first = call_rollout_fn(function, args, 0, source, evaluation=False)
        evaluation = generate_rollout(args, 0, source, evaluation=True)
        second = call_rollout_fn(function, args, 1, source, evaluation=False)
    finally:
        load_function("own_worker.stop")()
    assert evaluation.data["held"]["rewards"] == [1.0] * 5
    groups = [*first.samples, *second.samples]
    assert all(sample.reward == 1.0 and sample.tokens for group in groups for sample in group)
    assert len({group[0].index for group in groups}) == 4, "each group once"


def delayed(generate):
    async def later(payload):
        await asyncio.sleep(0.005)
        return await generate(payload)

    return later
