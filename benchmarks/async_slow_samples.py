"""What one slow sample in every batch costs: the loops of train.py and train_async.py, and the fully asynchronous pool.

    python benchmarks/async_slow_samples.py
    python benchmarks/async_slow_samples.py --prompts 32 --samples 8 --steps 20 --times 50

The rollout functions, the pool, its limits and its accounts are slime's own. Engine, trainer and time are simulated: a
token takes --token-s whatever else runs (decoding that is bound by memory), new weights end every request in flight
(--pause-generation-mode abort), and the clock jumps to the next event. So the table says what the schedule costs, not
what a machine does, and is the same everywhere.
"""

import argparse
import asyncio
import json
import random
import selectors
import sys
import tempfile
from argparse import Namespace
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slime.rollout import sglang_rollout
from slime.rollout.base_types import RolloutFnTrainOutput, flatten_samples
from slime.rollout.data_source import load_data_source
from slime.rollout.fully_async_rollout import AsyncRolloutWorker
from slime.rollout.ledger import take_ledger_line
from slime.rollout.staleness import reset_weight_clock, staleness, weight_clock
from slime.utils.misc import SingletonMeta
from slime.utils.types import Sample

MODES = ("train.py", "train_async.py", "fully async, discard", "fully async, mask", "fully async, wait")


@dataclass(frozen=True)
class Workload:
    """Sizes and speeds; times in simulated seconds."""

    prompts: int = 32
    samples: int = 1
    steps: int = 20
    tokens: int = 100
    """Of an ordinary response, on average; they vary by half of it."""
    times: int = 50
    """How much longer the slow one of each batch is."""
    token_s: float = 0.01
    train_s: float = 1.0
    sync_s: float = 0.05
    buffer_size: int = 1
    interval: int = 1
    seed: int = 0


@dataclass
class Result:
    """What one simulated run did."""

    seconds: float = 0.0
    trained: int = 0
    slow_trained: int = 0
    discarded: int = 0
    """Groups that were thrown away because they were too old."""
    masked_tokens: int = 0
    staleness: list[int] = field(default_factory=list)
    ledger: list[dict[str, Any]] = field(default_factory=list)

    @property
    def samples_per_s(self) -> float:
        return self.trained / self.seconds


# ---- simulated time ----


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of sleeping until a timer, moves the clock there."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("Everything waits and no timer runs: the simulation would never end.")
        self.now += max(timeout, 0.0)
        return super().select(0)


class _JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_in_jumping_time(main: Coroutine[Any, Any, Any]) -> Any:
    """`asyncio.run` on a clock that jumps to the next timer."""
    with asyncio.Runner(loop_factory=_JumpingLoop) as runner:
        return runner.run(main)


# ---- a simulated engine ----


class SimulatedEngine:
    """Generates at a fixed speed a request; an update of weights ends what is in flight, with what it has."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._update = asyncio.Event()

    async def generate(self, args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
        loop, wanted = asyncio.get_running_loop(), int(str(sample.label)) - sample.response_length
        version, update, started = weight_clock().current, self._update, loop.time()
        try:
            await asyncio.wait_for(update.wait(), wanted * self.workload.token_s)
            made = min(wanted, int((loop.time() - started) / self.workload.token_s))
            finish = "abort"
        except TimeoutError:
            made, finish = wanted, "stop"
        sample.tokens = sample.tokens or [0]
        meta = {"weight_version": version, "finish_reason": {"type": finish}}
        sample.append_response_tokens(tokens=[1] * made, log_probs=[-1.0] * made, meta_info=meta)
        return sample

    async def new_weights(self, trained: int) -> None:
        """As the weight sync does it: requests end, wait, and go on with the next version."""
        weight_clock().begin_update()
        self._update.set()
        self._update = asyncio.Event()
        await asyncio.sleep(self.workload.sync_s)
        weight_clock().end_update(str(trained + 1), trained)


_engine: SimulatedEngine | None = None


async def generate(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """What --custom-generate-function-path names."""
    assert _engine is not None
    return await _engine.generate(args, sample, sampling_params)


async def no_reward(args: Namespace, sample: Sample, **kwargs: Any) -> float:
    """What --custom-rm-path names."""
    return 0.0


# ---- the loops ----


def simulate(mode: str, workload: Workload, *, with_slow: bool) -> Result:
    """Run `workload.steps` steps of one loop on prompts of which one in each batch is slow, or none."""
    global _engine
    SingletonMeta._instances.clear()
    reset_weight_clock()
    with tempfile.TemporaryDirectory() as folder:
        args = _args(mode, workload, _write_prompts(Path(folder), workload, with_slow))
        vars(sglang_rollout.GenerateState(args))["tokenizer"] = None  # nobody reads text here
        _engine = SimulatedEngine(workload)
        try:
            return run_in_jumping_time(_train(mode, args, workload))  # type: ignore[no-any-return]
        finally:
            _engine = None
            reset_weight_clock()


def _write_prompts(folder: Path, workload: Workload, with_slow: bool) -> Path:
    """The label of a prompt is the number of its tokens."""
    chance, path = random.Random(workload.seed), folder / "prompts.jsonl"
    with path.open("w") as lines:
        for row in range(2 * workload.steps * workload.prompts):
            length = int(workload.tokens * chance.uniform(0.5, 1.5))
            is_slow = with_slow and row % workload.prompts == workload.prompts // 2
            label = workload.tokens * workload.times if is_slow else length
            lines.write(json.dumps({"prompt": "slow" if is_slow else "ordinary", "label": str(label)}) + "\n")
    return path


def _args(mode: str, workload: Workload, prompts: Path) -> Namespace:
    is_pool, overlaps = mode.startswith("fully async"), mode != "train.py"
    return Namespace(
        hf_checkpoint=None, prompt_data=str(prompts), input_key="prompt", label_key="label", tool_key=None,
        metadata_key="metadata", multimodal_keys=None, apply_chat_template=False, apply_chat_template_kwargs={},
        rollout_global_dataset=True, rollout_shuffle=False, rollout_max_prompt_len=None, rollout_seed=workload.seed,
        data_source_path="slime.rollout.data_source.RolloutDataSourceWithBuffer", save=None, load=None,
        rollout_batch_size=workload.prompts, over_sampling_batch_size=workload.prompts,
        n_samples_per_prompt=workload.samples, partial_rollout=False, group_rm=False,
        custom_generate_function_path=f"{__name__}.generate", custom_rm_path=f"{__name__}.no_reward", rm_type=None,
        sglang_server_concurrency=10**6, rollout_num_engines=1, rollout_temperature=1.0, rollout_top_p=1.0,
        rollout_top_k=-1, rollout_max_response_len=10**9, rollout_stop=None, rollout_stop_token_ids=None,
        rollout_skip_special_tokens=False, async_buffer_size=workload.buffer_size,
        max_staleness=workload.buffer_size + workload.interval if overlaps else None,
        stale_samples=mode.split(", ")[1] if is_pool else "discard",
    )  # fmt: skip


async def _train(mode: str, args: Namespace, workload: Workload) -> Result:
    assert _engine is not None
    result, source = Result(), load_data_source(args)
    await _engine.new_weights(0)
    started = asyncio.get_running_loop().time()
    rollouts = _Pool(args, source) if mode.startswith("fully async") else _Ahead(args, source, mode, workload)
    await rollouts.begin()
    for rollout_id in range(workload.steps):
        output = await rollouts.take(rollout_id)
        _account(result, args, source, rollout_id, output)
        await asyncio.sleep(workload.train_s)
        if (rollout_id + 1) % workload.interval == 0:
            await _engine.new_weights(rollout_id + 1)
    result.seconds = asyncio.get_running_loop().time() - started
    await rollouts.end()
    return result


class _Pool:
    def __init__(self, args: Namespace, source: Any) -> None:
        self._worker = AsyncRolloutWorker(args, source)

    async def begin(self) -> None:
        await self._worker.begin()

    async def take(self, rollout_id: int) -> RolloutFnTrainOutput:
        return await self._worker.collect(rollout_id)

    async def end(self) -> None:
        await self._worker.end()


class _Ahead:
    """Whole rollouts: on demand (train.py), or up to the buffer's size ahead (train_async.py)."""

    def __init__(self, args: Namespace, source: Any, mode: str, workload: Workload) -> None:
        self._args, self._source, self._steps = args, source, workload.steps
        self._ahead = 0 if mode == "train.py" else workload.buffer_size
        self._made: asyncio.Queue[RolloutFnTrainOutput] = asyncio.Queue()
        self._may_begin = asyncio.Semaphore(0)
        self._maker: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        self._maker = asyncio.create_task(self._make_all())
        for _ in range(self._ahead):
            self._may_begin.release()

    async def _make_all(self) -> None:
        for rollout_id in range(self._steps):
            await self._may_begin.acquire()
            output, _ = await sglang_rollout.generate_rollout_async(self._args, rollout_id, self._source.get_samples)
            await self._made.put(output)

    async def take(self, rollout_id: int) -> RolloutFnTrainOutput:
        self._may_begin.release()
        return await self._made.get()

    async def end(self) -> None:
        assert self._maker is not None
        self._maker.cancel()


def _account(result: Result, args: Namespace, source: Any, rollout_id: int, output: RolloutFnTrainOutput) -> None:
    samples = flatten_samples(output.samples)
    metrics = output.metrics or {}
    result.trained += len(samples)
    result.slow_trained += sum(sample.prompt == "slow" for sample in samples)
    result.discarded += metrics.get("rollout/staleness/discarded_groups", 0)
    result.masked_tokens += metrics.get("rollout/staleness/masked_tokens", 0)
    result.staleness += [age for sample in samples if (age := staleness(sample, rollout_id)) is not None]
    result.ledger.append(take_ledger_line(source, rollout_id, output))


# ---- the table ----


def table(workload: Workload) -> str:
    """One line a loop: with and without the slow samples, and what became of them."""
    lines = [
        "| loop | samples/s without | with one slow in a batch | ratio | slow: trained | too old, discarded (groups) | "
        "staleness mean, max |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode in MODES:
        plain, slow = (simulate(mode, workload, with_slow=with_slow) for with_slow in (False, True))
        mean = sum(slow.staleness) / max(1, len(slow.staleness))
        lines.append(
            f"| {mode} | {plain.samples_per_s:.1f} | {slow.samples_per_s:.1f} | "
            f"{slow.samples_per_s / plain.samples_per_s:.0%} | {slow.slow_trained} | {slow.discarded} | "
            f"{mean:.1f}, {max(slow.staleness, default=0)} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table for one workload."""
    default = Workload()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in (
        ("prompts", int), ("samples", int), ("steps", int), ("tokens", int), ("times", int), ("token-s", float),
        ("train-s", float), ("sync-s", float), ("buffer-size", int), ("interval", int), ("seed", int),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=getattr(default, name.replace("-", "_")))
    workload = Workload(**vars(parser.parse_args(argv)))
    print(workload)
    print(table(workload))


if __name__ == "__main__":
    # Functions are named by module: under this name they are the same objects.
    sys.modules["async_slow_samples"] = sys.modules["__main__"]
    main()
