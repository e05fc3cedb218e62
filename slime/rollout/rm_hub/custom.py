"""`--custom-rm-path`: a user's reward, as a function of one sample, of a list of samples, or as a class.

A class is built once, from `--rm-model-path`, and its `compute_reward(prompts, responses)` runs in a thread, one call
at a time; samples that arrive while it runs are given to it together in the next call. In the deterministic modes each
call gets one sample: which samples arrive together is a matter of timing, and a model's numbers may depend on it.
"""

import argparse
import asyncio
import inspect
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from slime.rollout.sampling import is_deterministic
from slime.utils.misc import load_function
from slime.utils.types import Sample

DEFAULT_NAMES = ("CustomRewardModel", "custom_rm", "reward_func", "compute_reward")
"""What is looked for in a `file.py` that names no function."""

MAX_MODEL_BATCH = 256


async def custom_reward(path: str, args: argparse.Namespace, sample: Sample, **kwargs: Any) -> Any:
    """The reward of one sample; a function whose second parameter is `samples` gets a list of one."""
    function = load_function(path, DEFAULT_NAMES)
    if inspect.isclass(function):
        return await _model(path, getattr(args, "rm_model_path", None), _max_batch(args)).reward(sample)
    if _second_parameter(function) == "samples":
        return _checked(path, await _call(function, args, [sample], **kwargs), 1)[0]
    return await _call(function, args, sample, **kwargs)


async def custom_rewards(path: str, args: argparse.Namespace, samples: Sequence[Sample], **kwargs: Any) -> list[Any]:
    """The rewards of a list of samples; a function whose second parameter is `sample` is called for each."""
    function = load_function(path, DEFAULT_NAMES)
    if inspect.isclass(function):
        model = _model(path, getattr(args, "rm_model_path", None), _max_batch(args))
        return list(await asyncio.gather(*(model.reward(sample) for sample in samples)))
    if _second_parameter(function) == "sample":
        return list(await asyncio.gather(*(_call(function, args, sample, **kwargs) for sample in samples)))
    return _checked(path, await _call(function, args, samples, **kwargs), len(samples))


async def _call(function: Callable[..., Any], *arguments: Any, **kwargs: Any) -> Any:
    """Awaits a coroutine function; runs any other in a thread, so that it does not hold up generation."""
    if inspect.iscoroutinefunction(function):
        return await function(*arguments, **kwargs)
    result = await asyncio.to_thread(function, *arguments, **kwargs)
    return await result if inspect.isawaitable(result) else result


@cache
def _second_parameter(function: Callable[..., Any]) -> str | None:
    names = list(inspect.signature(function).parameters)
    return names[1] if len(names) > 1 else None


def _checked(path: str, rewards: Any, count: int) -> list[Any]:
    """The rewards as a list of the right length."""
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    if not isinstance(rewards, list | tuple) or len(rewards) != count:
        got = f"{len(rewards)} of them" if isinstance(rewards, list | tuple) else f"{type(rewards).__name__}"
        raise ValueError(f"{path} was given {count} samples and must return a list of {count} rewards, got {got}.")
    return list(rewards)


def _max_batch(args: argparse.Namespace) -> int:
    return 1 if is_deterministic(args) else MAX_MODEL_BATCH


@cache
def _model(path: str, model_path: str | None, max_batch: int) -> "_RewardModel":
    """The one instance of a reward class in this process."""
    cls = load_function(path, DEFAULT_NAMES)
    if not callable(getattr(cls, "compute_reward", None)):
        raise TypeError(f"The reward class {cls.__name__} of {path} needs a method compute_reward(prompts, responses).")
    takes_path = len(inspect.signature(cls).parameters) > 0
    if takes_path and model_path is None and _needs_path(cls):
        raise ValueError(f"The reward class {cls.__name__} of {path} is built from --rm-model-path, which is missing.")
    return _RewardModel(path, cls(model_path) if takes_path else cls(), max_batch)


def _needs_path(cls: type) -> bool:
    first = next(iter(inspect.signature(cls).parameters.values()))
    return first.default is inspect.Parameter.empty and first.kind is not inspect.Parameter.VAR_POSITIONAL


class _RewardModel:
    """Calls a reward object in a thread, with as many samples at a time as are waiting on one event loop."""

    def __init__(self, path: str, model: Any, max_batch: int = MAX_MODEL_BATCH) -> None:
        self.max_batch = max_batch
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward-model")
        self._path = path
        self._model = model
        self._takes_labels = "labels" in inspect.signature(model.compute_reward).parameters
        self._waiting: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Waiting] = weakref.WeakKeyDictionary()

    async def reward(self, sample: Sample) -> Any:
        waiting = self._waiting.setdefault(asyncio.get_running_loop(), _Waiting(self))
        return await waiting.reward(sample)

    def compute(self, samples: Sequence[Sample]) -> list[Any]:
        labels = {"labels": [sample.label for sample in samples]} if self._takes_labels else {}
        prompts, responses = [sample.prompt for sample in samples], [sample.response for sample in samples]
        return _checked(self._path, self._model.compute_reward(prompts, responses, **labels), len(samples))


class _Waiting:
    """The samples of one event loop that wait for the reward object: a future belongs to its loop."""

    def __init__(self, model: _RewardModel) -> None:
        self._model = model
        self._samples: list[tuple[Sample, asyncio.Future[Any]]] = []
        self._runner: asyncio.Task[None] | None = None

    async def reward(self, sample: Sample) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._samples.append((sample, future))
        if self._runner is None or self._runner.done():
            self._runner = loop.create_task(self._run())
        return await future

    async def _run(self) -> None:
        model, loop = self._model, asyncio.get_running_loop()
        while self._samples:
            await asyncio.sleep(0)  # let the samples that are ready now join
            batch, self._samples = self._samples[: model.max_batch], self._samples[model.max_batch :]
            try:
                rewards = await loop.run_in_executor(model.thread, model.compute, [sample for sample, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), reward in zip(batch, rewards, strict=True):
                if not future.done():
                    future.set_result(reward)
