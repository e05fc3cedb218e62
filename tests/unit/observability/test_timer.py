"""A step's phases add up to the step; timers of a process add up by name."""

import pytest

from slime.observability import metric_names
from slime.observability.timer import StepClock, Timer, inverse_timer, timer, with_defer


class FakeTime:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def passes(self, seconds: float) -> None:
        self.now_s += seconds


def test_phases_and_other_add_up_to_the_step() -> None:
    time = FakeTime()
    clock = StepClock(now=time)
    time.passes(1)
    with clock.phase("generate"):
        time.passes(10)
    with clock.phase("train"):
        time.passes(5)
    with clock.phase("generate"):
        time.passes(2)
    time.passes(0.5)
    result = clock.finish()
    assert result == {
        "perf/generate_time": 12,
        "perf/train_time": 5,
        "perf/other_time": 1.5,
        "perf/step_time": 18.5,
    }
    assert metric_names.undeclared(result) == []


def test_a_phase_inside_another_is_not_counted_twice() -> None:
    time = FakeTime()
    clock = StepClock(now=time)
    with clock.phase("sync"):
        time.passes(1)
        with clock.phase("offload"):
            time.passes(3)
            with clock.phase("sync"):
                time.passes(2)
        time.passes(1)
    result = clock.finish()
    assert (result["perf/sync_time"], result["perf/offload_time"], result["perf/step_time"]) == (4, 3, 7)


def test_the_next_step_begins_where_the_last_ended() -> None:
    time = FakeTime()
    clock = StepClock(now=time)
    with clock.phase("generate"):
        time.passes(10)
    clock.finish()
    time.passes(3)
    assert clock.finish() == {"perf/other_time": 3, "perf/step_time": 3}


def test_a_phase_that_raises_is_closed() -> None:
    time = FakeTime()
    clock = StepClock(now=time)
    with pytest.raises(KeyError), clock.phase("train"):
        time.passes(4)
        raise KeyError
    time.passes(1)
    assert clock.finish() == {"perf/train_time": 4, "perf/other_time": 1, "perf/step_time": 5}


def test_a_step_cannot_end_inside_a_phase() -> None:
    clock = StepClock()
    with clock.phase("train"), pytest.raises(RuntimeError, match="'train'"):
        clock.finish()


def test_an_unknown_phase_is_an_error_that_lists_the_known() -> None:
    with (
        pytest.raises(ValueError, match=r"'trian'; known: generate, wait_for_rollout, train"),
        StepClock().phase("trian"),
    ):
        pass


@pytest.fixture
def process_timer() -> Timer:
    Timer().reset()
    return Timer()


def test_a_timer_sums_what_runs_under_its_name(process_timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    time = FakeTime()
    monkeypatch.setattr("slime.observability.timer.time.perf_counter", time)

    @timer
    def log_probs(x: int) -> int:
        time.passes(2)
        return x + 1

    assert log_probs(1) == 2 and log_probs(2) == 3
    with timer("train"):
        time.passes(5)
        with inverse_timer("train"):
            time.passes(100)
        time.passes(1)
    assert process_timer.log_dict() == {"log_probs": 4, "train": 6}
    process_timer.reset("train")
    assert process_timer.log_dict() == {"log_probs": 4}


def test_starting_twice_and_ending_what_never_started_are_errors(process_timer: Timer) -> None:
    process_timer.start("a")
    with pytest.raises(RuntimeError, match="running already"):
        process_timer.start("a")
    with pytest.raises(RuntimeError, match="running: a"):
        process_timer.end("b")
    process_timer.end("a")


def test_deferred_work_is_done_after_success_and_after_failure() -> None:
    done: list[str] = []

    @with_defer(lambda: done.append("deferred"))
    def work(fails: bool) -> str:
        done.append("work")
        if fails:
            raise ValueError
        return "result"

    assert work(fails=False) == "result"
    with pytest.raises(ValueError):
        work(fails=True)
    assert done == ["work", "deferred", "work", "deferred"]
