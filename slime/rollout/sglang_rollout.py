"""The default rollout: groups of samples are generated side by side behind the router, rewarded and filtered.

One loop per rollout keeps enough groups in flight, takes each finished one through the dynamic filter until
`--rollout-batch-size` groups are kept, and aborts the rest; with `--partial-rollout` these go back to the data source.
In the deterministic modes a finished group waits until every group that was started before it has been judged, so that
what is kept, and what is drawn next, does not depend on which engine was faster.
"""

import asyncio
import logging
import random
import time
from argparse import Namespace
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from slime.observability.trace_utils import build_sglang_meta_trace_attrs, trace_function, trace_span
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput, flatten_samples
from slime.rollout.collection import Collection, Outcome, first_index
from slime.rollout.custom_generate import call_generate_function
from slime.rollout.engine_requests import _prepare_prompt_ids, prepare_request, take_reply
from slime.rollout.eval_samples import eval_reward, eval_sample
from slime.rollout.group_tasks import cancel, gather_or_cancel, named, next_finished, task_name, task_number
from slime.rollout.progress import progress_bar
from slime.rollout.rm_hub import async_rm, batched_async_rm
from slime.rollout.sample_hooks import apply_rollout_sample_hooks
from slime.rollout.sampling import (
    eval_sampling_params,
    eval_seed,
    is_deterministic,
    rollout_sampling_params,
    sample_seed,
    session_id,
)
from slime.rollout.staleness import assume_version, weight_clock
from slime.utils.api_key import is_own_server
from slime.utils.async_utils import LoopSemaphore, run
from slime.utils.data import Dataset
from slime.utils.eval_config import EvalDatasetConfig
from slime.utils.http_utils import _wrap_ipv6, get, get_rollout_num_engines, post
from slime.utils.misc import SingletonMeta, load_function
from slime.utils.processing_utils import load_processor, load_tokenizer
from slime.utils.types import Sample

__all__ = [
    "EVAL_PROMPT_DATASET",
    "GenerateState",
    "_prepare_prompt_ids",
    "abort",
    "eval_rollout",
    "eval_rollout_single_dataset",
    "generate",
    "generate_and_rm",
    "generate_and_rm_group",
    "generate_rollout",
    "generate_rollout_async",
    "get_model_url",
]

logger = logging.getLogger(__name__)

GENERATE_NAMES = ("custom_generate", "generate")
"""What a `--custom-generate-function-path file.py` without a name may call its function."""

EVAL_PROMPT_DATASET: dict[Any, Dataset] = {}
"""Evaluation files that were read, by task."""

_ABORT_POLL_S = 3.0


class GenerateState(metaclass=SingletonMeta):
    """What the coroutines of a rollout share; one a process."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.semaphore = LoopSemaphore(args.sglang_server_concurrency * max(1, get_rollout_num_engines(args)))
        self.sampling_params = rollout_sampling_params(args)
        if is_deterministic(args):
            # For users' own loops; `sample_seed` is what requests get here.
            self.group_sampling_seeds = [args.rollout_seed + i for i in range(args.n_samples_per_prompt)]
        self.dp_counts = [0] * (getattr(args, "sglang_dp_size", None) or 1)
        self.dp_rank = 0
        self.reset()

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.args.hf_checkpoint, trust_remote_code=getattr(self.args, "trust_remote_code", False))

    @cached_property
    def processor(self) -> Any | None:
        return load_processor(self.args.hf_checkpoint, trust_remote_code=getattr(self.args, "trust_remote_code", False))

    @contextmanager
    def dp_rank_context(self) -> Iterator[int]:
        """Counts a request on one of the least loaded data-parallel ranks of the engine, and says which."""
        fewest = min(self.dp_counts)
        ranks = [rank for rank, count in enumerate(self.dp_counts) if count == fewest]
        self.dp_rank = rank = ranks[0] if is_deterministic(self.args) else random.choice(ranks)
        self.dp_counts[rank] += 1
        try:
            yield rank
        finally:
            self.dp_counts[rank] -= 1

    def reset(self) -> None:
        """Ready for the next rollout."""
        self.remaining_batch_size = 0
        """Groups kept or in flight."""
        self.pendings: set[asyncio.Task[list[Any]]] = set()
        self.aborted = False
        self._num_submitted = 0

    def submit_generate_tasks(self, groups: list[list[Any]]) -> None:
        """Start one task a group."""
        for group in groups:
            params = self.sampling_params.copy()
            call = generate_and_rm_group(self.args, group, params, evaluation=False)
            self.pendings.add(asyncio.create_task(call, name=task_name(self._num_submitted)))
            self._num_submitted += 1
        self.remaining_batch_size += len(groups)


def get_model_url(args: Namespace, model_name: str = "default", endpoint: str = "/generate") -> str:
    """Where the router of `model_name` answers `endpoint`; a name without a router of its own has the default one."""
    routers = getattr(args, "sglang_model_routers", None) or {}
    host, port = routers.get(model_name) or (args.sglang_router_ip, args.sglang_router_port)
    return f"http://{_wrap_ipv6(host)}:{port}{endpoint}"


# ---- one sample ----


async def generate(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """One call of the engine: appends what it generates to `sample`, which may have been begun before."""
    state = GenerateState(args)
    request = prepare_request(args, sample, sampling_params, state.tokenizer, state.processor)
    if request is None:
        return sample
    version = weight_clock().current
    with trace_span(sample, "sglang_generate") as span:
        reply = await post(get_model_url(args), request.payload, headers=request.headers)
        take_reply(args, sample, reply, version)
        span.update(build_sglang_meta_trace_attrs(reply["meta_info"]))
    return sample


@trace_function("generate_and_rm", target="sample")
async def generate_and_rm(
    args: Namespace, sample: Any, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample | list[Any]:
    """Generate a response, run the sample hooks, and reward it unless the reward is there or comes by group.

    Returns:
        the sample, or the list of samples that a custom generate function made of it.
    """
    if isinstance(sample, list):  # made by an earlier call, recycled with its group
        return sample
    is_group_rm = getattr(args, "group_rm", False)
    if (
        getattr(args, "partial_rollout", False)
        and getattr(args, "mask_offpolicy_in_partial_rollout", False)
        and sample.response_length > 0
    ):
        sample.loss_mask = [0] * sample.response_length
    if sample.status in (Sample.Status.COMPLETED, Sample.Status.TRUNCATED):
        assert is_group_rm or sample.reward is not None, f"Sample {sample.index} is finished but has no reward."
        return sample  # type: ignore[no-any-return]
    state = GenerateState(args)
    async with state.semaphore:
        if state.aborted:
            sample.status = Sample.Status.ABORTED
            return sample  # type: ignore[no-any-return]
        with state.dp_rank_context():
            result = await _generate_across_updates(args, state, sample, sampling_params, evaluation)
    result = await apply_rollout_sample_hooks(args, result, evaluation=evaluation)
    return result if is_group_rm else await _reward(args, result)  # type: ignore[no-any-return]


async def _generate_across_updates(
    args: Namespace, state: GenerateState, sample: Sample, sampling_params: dict[str, Any], evaluation: bool
) -> Any:
    """Generate, and go on where new weights cut the sample (--pause-generation-mode abort): with the tokens it has."""
    while True:
        clock = weight_clock()
        num_updates = await clock.settled()
        version = clock.current
        result = await _generate_by_any_function(args, state, sample, sampling_params, evaluation)
        assume_version(result, version)
        has_met_update = clock.is_updating or clock.num_updates > num_updates
        is_cut = isinstance(result, Sample) and result.status == Sample.Status.ABORTED
        if state.aborted or not (is_cut and has_met_update):
            return result
        sample = result


async def _generate_by_any_function(
    args: Namespace, state: GenerateState, sample: Sample, sampling_params: dict[str, Any], evaluation: bool
) -> Any:
    path = sample.generate_function_path or getattr(args, "custom_generate_function_path", None)
    if path is None:
        return await generate(args, sample, sampling_params)
    function = load_function(path, GENERATE_NAMES) if path.endswith(".py") else load_function(path)
    return await call_generate_function(
        function,
        args,
        sample,
        sampling_params,
        evaluation=evaluation,
        tokenizer=getattr(state, "tokenizer", None),
    )


async def _reward(args: Namespace, result: Any) -> Any:
    """Give a sample, or each of a list, its reward; nothing that was aborted is rewarded."""
    if isinstance(result, list):
        samples = flatten_samples(result)
        if any(sample.status == Sample.Status.ABORTED for sample in samples):
            return result
        without = [sample for sample in samples if sample.reward is None]
        if without:
            with trace_span(without, "reward_model"):
                rewards = await batched_async_rm(args, without)
            for sample, reward in zip(without, rewards, strict=True):
                sample.reward = reward
    elif result.status != Sample.Status.ABORTED and result.reward is None:
        with trace_span(result, "reward_model"):
            result.reward = await async_rm(args, result)
    return result


# ---- one group ----


@trace_function("generate_and_rm_group", target="group")
async def generate_and_rm_group(
    args: Namespace, group: list[Any], sampling_params: dict[str, Any], evaluation: bool = False
) -> list[Any]:
    """All samples of one prompt, side by side; with `--group-rm` they are rewarded together."""
    state = GenerateState(args)
    if state.aborted:
        return group
    calls = []
    for position, sample in enumerate(group):
        params = sampling_params.copy()
        if isinstance(sample, Sample):
            if sample.session_id is None:
                sample.session_id = session_id(args, sample, position)
            if is_deterministic(args):
                params["sampling_seed"] = sample_seed(args, sample, position)
        calls.append(named(sample, generate_and_rm(args, sample, params, evaluation=evaluation)))
    made = await gather_or_cancel(calls)
    if getattr(args, "group_rm", False) and not state.aborted:
        samples = flatten_samples(made)
        with trace_span(samples, "group_reward_model"):
            rewards = await batched_async_rm(args, samples)
        for sample, reward in zip(samples, rewards, strict=True):
            sample.reward = reward
    return made


# ---- one rollout ----


async def generate_rollout_async(
    args: Namespace, rollout_id: int, data_source: Callable[[int], list[list[Sample]]]
) -> tuple[RolloutFnTrainOutput, list[list[Any]]]:
    """One rollout for training.

    Args:
        data_source: gives that many groups.

    Returns:
        the kept groups in the order of their prompts with the filter's counts, and the groups that were aborted
        (with `--partial-rollout`; else they are gone).
    """
    assert args.rollout_global_dataset, "The default rollout reads prompts from a dataset (--prompt-data)."
    state = GenerateState(args)
    started = time.perf_counter()
    collection = Collection(args, rollout_id, _load_optional(args, "dynamic_sampling_filter_path"))
    try:
        with progress_bar(collection.target, f"rollout {rollout_id}") as bar:
            while not collection.is_full:
                await _keep_in_flight(args, state, collection, data_source)
                for task in await next_finished(state.pendings, in_order=is_deterministic(args)):
                    state.pendings.discard(task)
                    outcome = collection.take(task_number(task), task.result(), state.remaining_batch_size)
                    state.remaining_batch_size -= outcome.is_replaced
                    bar.update(int(outcome is Outcome.KEPT))
        aborted = await abort(args, rollout_id)
    except BaseException:
        await cancel(state.pendings)
        raise
    finally:
        state.reset()
    groups = sorted(collection.kept, key=first_index)
    fates = collection.fates(keeps_unfinished=_keeps_unfinished(args))
    _process(args, "rollout_sample_filter_path", groups)
    _process(args, "rollout_all_samples_process_path", sorted(collection.finished, key=first_index), data_source)
    logger.info(
        "rollout %d: %d groups of %d in %.1f s  dropped %d  discarded %d  to be continued %d",
        rollout_id,
        len(groups),
        args.n_samples_per_prompt,
        time.perf_counter() - started,
        collection.num_dropped,
        len(fates.discarded),
        len(aborted),
    )
    return RolloutFnTrainOutput(samples=groups, metrics=collection.metrics(fates), fates=fates), aborted


async def _keep_in_flight(
    args: Namespace, state: GenerateState, collection: Collection, data_source: Callable[[int], list[list[Sample]]]
) -> None:
    """Submit groups, `--over-sampling-batch-size` at a time, until those kept and in flight can fill the batch.

    The loop gets a turn after each group: engines work on the first requests while the last are still being made.
    """
    while state.remaining_batch_size < collection.target:
        groups = data_source(args.over_sampling_batch_size)
        if not groups:
            raise RuntimeError(
                f"The data source gave no group where {args.over_sampling_batch_size} were asked for; "
                f"the rollout still needs {collection.target - state.remaining_batch_size}."
            )
        collection.note_drawn(groups)
        for group in groups:
            state.submit_generate_tasks([group])
            await asyncio.sleep(0)


def _load_optional(args: Namespace, flag: str) -> Callable[..., Any] | None:
    path = getattr(args, flag, None)
    return None if path is None else load_function(path)


def _process(args: Namespace, flag: str, *values: Any) -> None:
    function = _load_optional(args, flag)
    if function is not None:
        function(args, *values)


async def abort(args: Namespace, rollout_id: int) -> list[list[Any]]:
    """End what is in flight.

    Returns:
        with `--partial-rollout` the groups it belonged to, to be continued; else nothing.
    """
    from slime.utils.server_control import abort_servers_until_idle

    state = GenerateState(args)
    assert not state.aborted, "The rollout is being aborted already."
    state.aborted = True
    groups: list[list[Any]] = []
    is_kept = _keeps_unfinished(args)
    deadline_s = float(getattr(args, "sglang_router_request_timeout_secs", None) or 14400)
    started = time.monotonic()
    while state.pendings:
        # A custom generate function may send another request after its first was aborted: ask again.
        await abort_servers_until_idle(await _worker_urls(args))
        done, state.pendings = await asyncio.wait(state.pendings, timeout=_ABORT_POLL_S)
        for task in sorted(done, key=task_number):
            if is_kept or task.exception() is None:
                groups.append(task.result())
            else:  # it would have been thrown away: no reason to end the run
                logger.warning("a group beyond what rollout %d needed failed: %s", rollout_id, task.exception())
        if time.monotonic() - started > deadline_s:
            raise TimeoutError(
                f"{len(state.pendings)} groups of rollout {rollout_id} had not ended {deadline_s:g} s after the abort. "
                "Does the generate function look at GenerateState(args).aborted, and does the reward function return?"
            )
    if not is_kept:
        return []
    for sample in flatten_samples(groups):
        if sample.response:
            sample.metadata.setdefault("start_rollout_id", rollout_id)
    return groups


def _keeps_unfinished(args: Namespace) -> bool:
    return bool(getattr(args, "partial_rollout", False))


async def _worker_urls(args: Namespace) -> list[str]:
    reply = await get(get_model_url(args, endpoint="/workers"))
    urls = [worker["url"] for worker in reply["workers"]]
    is_own_server(*urls)
    return urls


# ---- evaluation ----


async def eval_rollout(args: Namespace, rollout_id: int) -> tuple[RolloutFnEvalOutput, list[list[Any]]]:
    """Evaluate on every task of `args.eval_datasets`, all at once; the second value is always empty."""
    results = await gather_or_cancel(
        [eval_rollout_single_dataset(args, rollout_id, config) for config in args.eval_datasets]
    )
    return RolloutFnEvalOutput(data={name: data for result in results for name, data in result.items()}), []


async def eval_rollout_single_dataset(
    args: Namespace, rollout_id: int, dataset_cfg: EvalDatasetConfig
) -> dict[str, dict[str, list[Any]]]:
    """One task: {name: {"rewards": [...], "truncated": [...], "samples": [...]}}, in the order of the file."""
    assert not getattr(args, "group_rm", False), "--group-rm rewards groups of a rollout; evaluation has none."
    started = time.perf_counter()
    prompts = _eval_dataset(args, dataset_cfg)
    base_params = eval_sampling_params(args, dataset_cfg)
    num_samples = dataset_cfg.n_samples_per_eval_prompt or 1
    calls: list[Coroutine[Any, Any, Any]] = []
    with progress_bar(len(prompts) * num_samples, f"eval {dataset_cfg.name}", "sample") as bar:
        for group_index, prompt in enumerate(prompts.samples):
            for j in range(num_samples):
                sample = eval_sample(prompt, dataset_cfg, group_index, index=len(calls))
                params = base_params.copy()
                if is_deterministic(args):
                    params["sampling_seed"] = eval_seed(args, dataset_cfg.name, group_index, j)
                calls.append(named(sample, _advancing(bar, generate_and_rm(args, sample, params, evaluation=True))))
        samples = flatten_samples(await gather_or_cancel(calls))
    samples.sort(key=lambda sample: sample.index or 0)
    result = {
        "rewards": [eval_reward(args, dataset_cfg.name, sample) for sample in samples],
        "truncated": [sample.status == Sample.Status.TRUNCATED for sample in samples],
        "samples": samples,
    }
    logger.info(
        "eval %s at rollout %d: %d prompts x %d in %.1f s",
        dataset_cfg.name,
        rollout_id,
        len(prompts),
        num_samples,
        time.perf_counter() - started,
    )
    return {dataset_cfg.name: result}


async def _advancing(bar: Any, coro: Coroutine[Any, Any, Any]) -> Any:
    result = await coro
    bar.update(1)
    return result


def _eval_dataset(args: Namespace, config: EvalDatasetConfig) -> Dataset:
    key = (config.cache_key, args.hf_checkpoint, config.apply_chat_template, args.eval_max_prompt_len)
    if key not in EVAL_PROMPT_DATASET:
        state = GenerateState(args)
        EVAL_PROMPT_DATASET[key] = Dataset(
            config.path,
            state.tokenizer,
            state.processor,
            args.eval_max_prompt_len,
            prompt_key=config.input_key or "text",
            multimodal_keys=config.multimodal_keys,
            label_key=config.label_key,
            tool_key=config.tool_key,
            metadata_key=config.metadata_key,
            apply_chat_template=bool(config.apply_chat_template),
            apply_chat_template_kwargs=config.apply_chat_template_kwargs,
        )
    return EVAL_PROMPT_DATASET[key]


# ---- the entry point ----


def generate_rollout(
    args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """One rollout for training, or one evaluation; runs on the background loop and waits for it."""
    assert args.rollout_global_dataset, "The default rollout reads prompts from a dataset (--prompt-data)."
    if evaluation:
        return run(eval_rollout(args, rollout_id))[0]
    output, aborted = run(generate_rollout_async(args, rollout_id, data_source.get_samples))
    if aborted:
        data_source.add_samples(aborted)
    return output
