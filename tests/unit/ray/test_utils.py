"""The lock that actors share, and threads that sleep while they wait."""

import pytest

from slime.ray.utils import Lock, add_default_ray_env_vars, thread_env


def test_a_lock_is_held_by_one_at_a_time() -> None:
    lock = Lock()
    assert lock.acquire()
    assert not lock.acquire()
    lock.release()
    assert lock.acquire()
    lock.release()
    with pytest.raises(RuntimeError, match="without a matching acquire"):
        lock.release()


def test_a_process_gets_its_threads_and_they_wait_asleep() -> None:
    env = thread_env(3)
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["OMP_WAIT_POLICY"] == "PASSIVE"


def test_what_the_user_sets_wins_over_the_default() -> None:
    assert add_default_ray_env_vars({"RAY_USE_UVLOOP": "1"})["RAY_USE_UVLOOP"] == "1"
    assert add_default_ray_env_vars()["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] == "1"
