"""Which reward a sample gets, in which form a user's reward may come, and what errors say."""

import asyncio
import json
import threading
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from slime.config.rules.algorithm import REWARDS
from slime.rollout.rm_hub import (
    RewardError,
    async_rm,
    batched_async_rm,
    grading_worker,
    known_types,
    remote,
    remote_rm,
    warm_up,
)
from slime.rollout.rm_hub.dispatch import GRADERS
from slime.utils.types import Sample


def a_sample(response: str = "", label: Any = "5", **fields: Any) -> Sample:
    return Sample(index=12, group_index=3, prompt="2 + 3 =", response=response, label=label, **fields)


@pytest.mark.parametrize(
    ("rm_type", "response", "label", "reward"),
    [
        ("math", r"\boxed{5}", "5", 1),
        ("math", r"\boxed{6}", "5", 0),
        (" math ", r"\boxed{5}", "5", 1),
        ("deepscaler", r"</think>\boxed{5}", "5", 1),
        ("dapo", "Answer: 5", "5", {"score": 1.0, "acc": True, "pred": "5"}),
        ("f1", "the cat", "cat", 1.0),
        ("gpqa", "The answer is B", "B", 1.0),
        ("answer_tag", "<answer>5</answer>", "5", 1.0),
        ("last_number", "it is 5", "5", 1.0),
        ("boxed_f1", r"the dog, so \boxed{the cat}", "cat", 1.0),
        ("boxed_f1", "no box", "cat", 0.0),
        ("boxed_last_number", r"\boxed{5} 6", "5", 1.0),
    ],
)
async def test_each_type_by_its_name(rm_type: str, response: str, label: str, reward: Any) -> None:
    assert await async_rm(Namespace(rm_type=rm_type), a_sample(response, label)) == reward


async def test_random_is_zero_or_one() -> None:
    rewards = await batched_async_rm(Namespace(rm_type="random"), [a_sample() for _ in range(60)])
    assert set(rewards) == {0, 1}


async def test_a_samples_own_type_wins_over_the_runs() -> None:
    sample = a_sample("<answer>5</answer>", metadata={"rm_type": "answer_tag"})
    assert await async_rm(Namespace(rm_type="math"), sample) == 1.0


@pytest.mark.parametrize("rm_type", ["maths", "boxed_", "", None])
async def test_an_unknown_type_lists_the_known(rm_type: str | None) -> None:
    with pytest.raises(NotImplementedError) as error:
        await async_rm(Namespace(rm_type=rm_type), a_sample())
    for name in (*known_types(), "boxed_", "--custom-rm-path"):
        assert name in str(error.value)
    assert set(GRADERS) < set(known_types())


def test_the_flags_check_knows_the_same_types() -> None:
    assert set(REWARDS) == {name.partition(":")[0] for name in known_types()}


async def test_a_reward_that_raises_names_the_sample_and_its_type() -> None:
    with pytest.raises(
        RewardError, match=r"'last_number' of sample 12 \(group 3\) failed: ValueError.*'five'"
    ) as error:
        await async_rm(Namespace(rm_type="last_number"), a_sample("5", "five"))
    assert isinstance(error.value.__cause__, ValueError)


async def test_grading_does_not_hold_up_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setitem(GRADERS, "slow", lambda *_: float(released.wait(10)))
    task = asyncio.create_task(async_rm(Namespace(rm_type="slow"), a_sample()))
    await asyncio.sleep(0.05)
    released.set()
    assert await task == 1.0


async def test_rewards_of_a_list_keep_its_order() -> None:
    samples = [a_sample(f"<answer>{n}</answer>", str(n % 2 * n)) for n in range(20)]
    assert await batched_async_rm(Namespace(rm_type="answer_tag"), samples) == [
        float(n % 2 == 1 or n == 0) for n in range(20)
    ]


REWARD_CLASS = """
class Model:
    built = []
    batches = []

    def __init__(self, model_path):
        Model.built.append(model_path)

    def compute_reward(self, prompts, responses):
        assert len(prompts) == len(responses)
        Model.batches.append(len(prompts))
        return [float(len(response)) for response in responses]
"""

CUSTOM = """
calls = []

async def single(args, sample, **kwargs):
    calls.append("single")
    return len(sample.response) + args.bonus + kwargs.get("extra", 0)

async def batched(args, samples, **kwargs):
    calls.append("batched")
    return [len(sample.response) for sample in samples]

def synchronous(args, sample):
    return {"score": len(sample.response)}

async def short(args, samples):
    return [1.0]

async def broken(args, sample):
    raise KeyError("no such field")

class ModelWithLabels:
    def compute_reward(self, prompts, responses, labels):
        return [float(r == l) for r, l in zip(responses, labels)]

class NotAModel:
    pass
"""


@pytest.fixture
def plug_in(tmp_path: Path) -> str:
    path = tmp_path / "my_rewards.py"
    path.write_text(CUSTOM + REWARD_CLASS)
    return str(path)


async def test_the_function_forms_work_alone_and_in_groups(plug_in: str) -> None:
    samples = [a_sample("a"), a_sample("bbb")]
    single = Namespace(custom_rm_path=f"{plug_in}:single", bonus=10)
    assert await async_rm(single, samples[0]) == 11
    assert await async_rm(single, samples[0], extra=5) == 16
    assert await batched_async_rm(single, samples) == [11, 13]
    batched = Namespace(custom_rm_path=f"{plug_in}:batched")
    assert await batched_async_rm(batched, samples) == [1, 3]
    assert await async_rm(batched, samples[1]) == 3
    assert await async_rm(Namespace(custom_rm_path=f"{plug_in}:synchronous"), samples[1]) == {"score": 3}


async def test_a_samples_own_function_wins_over_the_runs(plug_in: str) -> None:
    args = Namespace(custom_rm_path=f"{plug_in}:single", bonus=10)
    sample = a_sample("abc", custom_rm_path=f"{plug_in}:synchronous")
    assert await async_rm(args, sample) == {"score": 3}
    assert await batched_async_rm(Namespace(rm_type="nothing"), [sample]) == [{"score": 3}]


async def test_a_file_with_one_function_needs_no_name(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text("async def anything(args, sample):\n    return 0.5\n")
    assert await async_rm(Namespace(custom_rm_path=str(path)), a_sample()) == 0.5


async def test_the_class_form_is_built_once_and_gets_waiting_samples_together(tmp_path: Path) -> None:
    path = tmp_path / "custom_rm.py"
    path.write_text(REWARD_CLASS.replace("Model", "CustomRewardModel"))
    args = Namespace(custom_rm_path=str(path), rm_model_path="some/model")
    samples = [a_sample("x" * n) for n in range(30)]
    assert await batched_async_rm(args, samples) == [float(n) for n in range(30)]
    assert await asyncio.gather(*(async_rm(args, sample) for sample in samples)) == [float(n) for n in range(30)]
    from slime.utils.misc import load_function

    cls = load_function(str(path), ("CustomRewardModel",))
    assert cls.built == ["some/model"]
    assert sum(cls.batches) == 60 and len(cls.batches) <= 6


def test_the_class_form_answers_on_every_event_loop(tmp_path: Path) -> None:
    """Two loops in two threads wait for one object, whose calls take long enough that both do. In debug mode a loop
    refuses to be given a result by another thread, which would not wake it."""
    path = tmp_path / "slow_rm.py"
    path.write_text(
        "import time\n\nclass CustomRewardModel:\n    def compute_reward(self, prompts, responses):\n"
        "        time.sleep(0.05)\n        return [len(response) for response in responses]\n"
    )
    args = Namespace(custom_rm_path=str(path), rm_model_path=None)

    async def rewards() -> list[Any]:
        made = []
        for _ in range(4):
            made += await asyncio.wait_for(asyncio.gather(*(async_rm(args, a_sample("x" * n)) for n in range(3))), 10)
        return made

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: asyncio.run(rewards(), debug=True), range(2)))
    assert found == [[0, 1, 2] * 4] * 2


async def test_the_class_form_may_ask_for_labels_and_need_no_path(plug_in: str) -> None:
    args = Namespace(custom_rm_path=f"{plug_in}:ModelWithLabels")
    assert await batched_async_rm(args, [a_sample("5"), a_sample("6")]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Model", "built from --rm-model-path, which is missing"),
        ("NotAModel", r"needs a method compute_reward\(prompts, responses\)"),
        ("broken", r"of sample 12 \(group 3\) failed: KeyError: 'no such field'"),
    ],
)
async def test_a_custom_reward_that_cannot_work_says_why(plug_in: str, name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        await async_rm(Namespace(custom_rm_path=f"{plug_in}:{name}", rm_model_path=None), a_sample())


async def test_a_batch_with_too_few_rewards_is_an_error(plug_in: str) -> None:
    args = Namespace(custom_rm_path=f"{plug_in}:short")
    with pytest.raises(RewardError, match="given 2 samples and must return a list of 2 rewards, got 1 of them"):
        await batched_async_rm(args, [a_sample(), a_sample()])


class RewardService(ThreadingHTTPServer):
    """Answers with the status codes of `script` in turn, then with the response's length."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RewardHandler)
        self.script: list[int] = []
        self.seen: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/reward"


class RewardHandler(BaseHTTPRequestHandler):
    server: RewardService

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(payload)
        status = self.server.script.pop(0) if self.server.script else 200
        body = json.dumps({"score": len(payload["response"])}).encode() if status != 201 else b"not json"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def service() -> Iterator[RewardService]:
    server = RewardService()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []

    async def record(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(remote.asyncio, "sleep", record)
    return pauses


async def test_the_remote_service_gets_prompt_response_and_label(service: RewardService) -> None:
    args = Namespace(rm_type="remote_rm", rm_url=service.url)
    assert await async_rm(args, a_sample("four")) == {"score": 4}
    assert service.seen == [{"prompt": "2 + 3 =", "response": "four", "label": "5"}]
    args.rm_type = "boxed_remote_rm"
    assert await async_rm(args, a_sample(r"so \boxed{5}")) == {"score": 1}


async def test_many_samples_ask_the_remote_service_at_once(service: RewardService) -> None:
    args = Namespace(rm_type="remote_rm", rm_url=service.url)
    rewards = await batched_async_rm(args, [a_sample("x" * n) for n in range(40)])
    assert rewards == [{"score": n} for n in range(40)]


async def test_server_errors_are_retried_with_growing_pauses(service: RewardService, no_pauses: list[float]) -> None:
    service.script = [500, 503, 429, 201]
    assert await remote_rm(Namespace(rm_url=service.url), a_sample("ok")) == {"score": 2}
    assert len(service.seen) == 5
    assert all(low <= pause <= low + 1 for low, pause in zip((2, 4, 8, 16), no_pauses, strict=True))


async def test_a_refused_request_is_not_repeated(service: RewardService, no_pauses: list[float]) -> None:
    service.script = [400]
    with pytest.raises(RewardError, match=r"HTTPStatusError.*400"):
        await async_rm(Namespace(rm_type="remote_rm", rm_url=service.url), a_sample())
    assert len(service.seen) == 1 and no_pauses == []


async def test_giving_up_names_the_service_the_attempts_and_the_last_error(no_pauses: list[float]) -> None:
    args = Namespace(rm_url="http://127.0.0.1:9/reward")
    with pytest.raises(
        RuntimeError, match=r"http://127\.0\.0\.1:9/reward gave no reward in 3 attempts .*Connect call failed"
    ):
        await remote_rm(args, a_sample(), max_retries=3)
    assert len(no_pauses) == 2


async def test_the_deadline_ends_the_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DEADLINE_S", 0.0)
    with pytest.raises(RuntimeError, match="in 1 attempts"):
        await remote_rm(Namespace(rm_url="http://127.0.0.1:9/reward"), a_sample())


async def test_a_remote_reward_needs_its_address() -> None:
    with pytest.raises(RewardError, match="needs --rm-url"):
        await async_rm(Namespace(rm_type="remote_rm", rm_url=None), a_sample())


@pytest.mark.parametrize(
    ("args", "questions"),
    [
        ({"rm_type": " math "}, [("sympy_equal",), ("math_verify_equal",)]),
        ({"rm_type": "boxed_deepscaler"}, [("sympy_equal",)]),
        ({"rm_type": "reasoning_gym:chess"}, [("reasoning_gym_score", "chess")]),
        ({"rm_type": "reasoning_gym"}, []),
        ({"rm_type": "f1"}, []),
        ({"rm_type": None}, []),
        ({"rm_type": "math", "custom_rm_path": "mine.reward"}, []),
    ],
)
def test_only_rewards_that_import_much_are_warmed_up(
    monkeypatch: pytest.MonkeyPatch, args: dict[str, Any], questions: list[Any]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(grading_worker, "warm_up", lambda *given: asked.extend(given))
    warm_up(Namespace(**args))
    assert asked == questions
