"""When the loop evaluates, saves and syncs."""

from slime.ray.schedule import Schedule


def test_intervals_count_finished_rollouts() -> None:
    schedule = Schedule(start=0, stop=10, eval_interval=4, save_interval=3)
    assert [i for i in schedule if schedule.evaluates_after(i)] == [3, 7]
    assert [i for i in schedule if schedule.saves_after(i)] == [2, 5, 8, 9], "the last rollout is always saved"


def test_a_resumed_run_knows_whether_its_checkpoint_was_made_by_the_interval() -> None:
    """Else it was made on SIGTERM, which exports nothing."""
    assert [i for i in range(5) if Schedule(start=i, stop=10, save_interval=3).saved_before_start] == [3]
    assert Schedule(start=10, stop=10, save_interval=3).saved_before_start


def test_the_end_of_an_epoch_counts_as_due() -> None:
    schedule = Schedule(start=0, stop=10, eval_interval=100, save_interval=100, rollouts_per_epoch=5)
    assert [i for i in schedule if schedule.evaluates_after(i)] == [4, 9]
    assert [i for i in schedule if schedule.saves_after(i)] == [4, 9]


def test_nothing_is_due_without_an_interval() -> None:
    schedule = Schedule(start=0, stop=3)
    assert not schedule.evaluates_first
    assert not any(schedule.evaluates_after(i) or schedule.saves_after(i) for i in schedule)


def test_a_resumed_run_does_not_evaluate_the_untrained_model_again() -> None:
    assert Schedule(start=0, stop=3, eval_interval=1).evaluates_first
    assert not Schedule(start=2, stop=3, eval_interval=1).evaluates_first
    assert not Schedule(start=0, stop=3, eval_interval=1, skips_first_eval=True).evaluates_first


def test_engines_get_the_final_weights_whatever_the_interval() -> None:
    schedule = Schedule(start=0, stop=5, sync_interval=3)
    assert [i for i in schedule if schedule.syncs_after(i)] == [2, 4]


def test_an_evaluation_reads_the_weights_of_its_own_step() -> None:
    schedule = Schedule(start=0, stop=6, sync_interval=4, eval_interval=3)
    assert [i for i in schedule if schedule.syncs_after(i)] == [2, 3, 5]


def test_a_model_is_exported_once_at_the_end_without_an_interval() -> None:
    schedule = Schedule(start=0, stop=3, exports=True)
    assert [i for i in schedule if schedule.saves_after(i)] == [2]
