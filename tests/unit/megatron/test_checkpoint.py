"""Saving in the background, what goes wrong while saving, what flags leave out when loading, and what is never read."""

import json
import os
import pickle
import random
import signal
import time
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from slime.utils import checkpoint_folder as cf
from tests.distributed import tiny
from tests.distributed.pool import RankError, RankPool

ROLLOUTS = [tiny.rollout(seed=seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf_model(tmp_path_factory.mktemp("model"), "qwen2", tie_word_embeddings=False)


def _trainer(rank: int, world_size: int, port: int, args: Any) -> Any:
    from slime.backends.megatron.trainer import MegatronTrainer

    return MegatronTrainer(args, rank, world_size, "127.0.0.1", port)


def _train(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    return tiny.train(args, rank, world_size, port, rollouts)


def _train_and_save(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    """Save after every rollout; the weights at each."""
    trainer = _trainer(rank, world_size, port, args)
    start, weights = trainer.init(), []
    for i, data in enumerate(rollouts):
        trainer.train(start + i, tiny.shard_of(trainer, data))
        trainer.save(start + i)
        weights.append(tiny.hf_weights(trainer))
    trainer.finish_saves(60)
    return weights


# --- in the background -----------------------------------------------------------------------------------------------


def _save_behind_training(rank: int, world_size: int, port: int, args: Any, as_on_a_gpu: bool) -> Any:
    """The background writer is held back until the next rollout is trained."""
    import threading

    from slime.backends.megatron import checkpoint_format, staging

    staging._is_on_gpu = lambda tensor: as_on_a_gpu
    gate, write = threading.Event(), checkpoint_format.CheckpointWriter.write
    checkpoint_format.CheckpointWriter.write = lambda self: gate.wait() and write(self)  # type: ignore[method-assign]
    trainer = _trainer(rank, world_size, port, args)
    trainer.init()
    pinned, take = [], trainer.accelerator.pinned
    trainer.accelerator.pinned = lambda size: pinned.append(size) or take(size)  # type: ignore[assignment]
    trainer.train(0, tiny.shard_of(trainer, ROLLOUTS[0]))
    trainer.save(0)
    saved, tracker = tiny.hf_weights(trainer), Path(args.save) / cf.LATEST_FILE
    staged = trainer.job._saver._staging
    num_free = [len(staged._free)]
    trainer.train(1, tiny.shard_of(trainer, ROLLOUTS[1]))
    seen = [tracker.exists()]
    gate.set()
    time.sleep(0.5)
    seen.append(tracker.exists())
    trainer.train(2, tiny.shard_of(trainer, ROLLOUTS[2]))
    seen.append(tracker.exists())
    trainer.save(2)
    trainer.finish_saves(60)
    num_free.append(len(staged._free))
    return saved, seen, tracker.read_text(), tiny.hf_weights(trainer), num_free, len(pinned)


@pytest.mark.parametrize("as_on_a_gpu", [False, True], ids=["cpu", "as on a GPU"])
def test_a_save_in_the_background_holds_the_weights_of_its_moment(
    ranks: RankPool, model: Path, tmp_path: Path, as_on_a_gpu: bool
) -> None:
    """Training goes on over the memory that is being saved; a later verb commits. Pinned memory is taken once."""
    args = tiny.training_args(model, save=str(tmp_path), async_save=True)
    saved, seen, tracker, last, num_free, num_pinned = ranks.run(_save_behind_training, 2, args, as_on_a_gpu)[0]
    assert num_pinned == as_on_a_gpu
    assert num_free == [0, as_on_a_gpu], "memory is free when its copies are written, and not before"
    assert seen == [False, False, True]
    assert tracker == "2\n"
    first = ranks.run(_train, 1, tiny.training_args(model, load=str(tmp_path), ckpt_step=0), [])[0]
    assert first["start"] == 1
    assert tiny.largest_difference(first["weights"], saved) == 0
    newest = ranks.run(_train, 1, tiny.training_args(model, load=str(tmp_path)), [])[0]
    assert newest["start"] == 3
    assert tiny.largest_difference(newest["weights"], last) == 0
    resumed = ranks.run(_train, 2, tiny.training_args(model, load=str(tmp_path), ckpt_step=0), ROLLOUTS[1:])[0]
    assert tiny.largest_difference(resumed["weights"], last) == 0, "the optimizer's state is of that moment too"


def _files_of_a_save(rank: int, world_size: int, port: int, args: Any, as_on_a_gpu: bool) -> bytes:
    from slime.backends.megatron import staging

    staging._is_on_gpu = lambda tensor: as_on_a_gpu
    trainer = _trainer(rank, world_size, port, args)
    trainer.init()
    for i in range(2):
        trainer.train(i, tiny.shard_of(trainer, ROLLOUTS[i]))
        trainer.save(i)
    trainer.finish_saves(60)
    return (Path(args.save) / "iter_0000001" / f"__{rank}_0.distcp").read_bytes()


def test_what_is_written_is_the_same_however_it_was_copied(ranks: RankPool, model: Path, tmp_path: Path) -> None:
    """Written from training's own memory, from clones, and from memory in which an earlier save lay."""
    ways = [(False, False), (True, False), (True, True)]
    files = []
    for i, (async_save, as_on_a_gpu) in enumerate(ways):
        args = tiny.training_args(model, save=str(tmp_path / str(i)), async_save=async_save, bf16=True)
        files.append(ranks.run(_files_of_a_save, 2, args, as_on_a_gpu))
    assert files[0] == files[1] == files[2]


def _copies(rank: int, world_size: int, port: int) -> Any:
    from slime.backends.megatron import memory, staging
    from slime.backends.megatron.accelerator import accelerator_for

    staging._is_on_gpu = lambda tensor: tensor.dtype is not torch.int64
    numbers = torch.arange(60, dtype=torch.float32).view(6, 10)
    tensors = [numbers[0].bfloat16(), numbers.T, numbers[3, 3], numbers[:0], torch.arange(3)]
    stage = staging.Staging(accelerator_for("cpu"))
    first, lent = stage.copies(tensors)
    second, other = stage.copies([tensor + 1 for tensor in tensors])
    assert lent is not None and other is not None
    own = [copy.untyped_storage().nbytes() == copy.nbytes for copy in first]
    stage.give_back(lent)
    places = {copy.data_ptr() for copy in first}
    held = [tensor.clone() for tensor in first]
    third, again = stage.copies([tensor + 2 for tensor in tensors])
    is_kept = again is lent and {copy.data_ptr() for copy in third[:3]} < places
    memory.host_memory_left = lambda: 5
    try:
        stage.copies(tensors)
    except MemoryError as error:
        return held, second, third, own, is_kept, stage.copies(tensors[4:])[1], str(error)
    return None


def test_memory_with_copies_that_are_being_written_is_lent_to_no_other_save(ranks: RankPool) -> None:
    first, second, third, own, is_kept, of_no_gpu, error = ranks.run(_copies, 1)[0]
    numbers = torch.arange(60, dtype=torch.float32).view(6, 10)
    tensors = [numbers[0].bfloat16(), numbers.T, numbers[3, 3], numbers[:0], torch.arange(3)]
    for i, copies in enumerate((first, second, third)):
        for copy, tensor in zip(copies, tensors, strict=True):
            assert torch.equal(copy, tensor + i) and copy.dtype == tensor.dtype
    assert all(own), "a file would hold all that a copy's storage holds"
    assert is_kept, "what was given back is used again"
    assert of_no_gpu is None
    assert "keeps 0.0 GiB of it on the host" in error and "leave --async-save out" in error


def _save_with_a_broken_disk(rank: int, world_size: int, port: int, args: Any) -> list[str]:
    from slime.backends.megatron import checkpoint_format

    written = checkpoint_format._written

    def fail(*arguments: Any) -> Any:
        if rank == 1:
            raise OSError(28, "No space left on device")
        return written(*arguments)

    trainer = _trainer(rank, world_size, port, args)
    trainer.init()
    trainer.train(0, tiny.shard_of(trainer, ROLLOUTS[0]))
    trainer.save(0)
    trainer.finish_saves()
    errors = []
    checkpoint_format._written = fail
    for verb in (lambda: trainer.save(1), trainer.finish_saves, lambda: trainer.save(1), trainer.finish_saves):
        try:
            verb()
        except RuntimeError as error:
            errors.append(str(error))
    return errors


@pytest.mark.parametrize("async_save", [True, False], ids=["background", "waiting"])
def test_an_error_while_writing_is_told_by_every_rank(
    ranks: RankPool, model: Path, tmp_path: Path, async_save: bool
) -> None:
    args = tiny.training_args(model, save=str(tmp_path), async_save=async_save)
    for errors in ranks.run(_save_with_a_broken_disk, 2, args):
        assert len(errors) == 2
        assert all("rank 1: OSError: [Errno 28] No space left on device" in error for error in errors)
        assert all("The checkpoint of rollout 1 was not saved" in error for error in errors)
    assert cf.find_checkpoint(tmp_path) == cf.Checkpoint(tmp_path, 0)
    assert not list(tmp_path.glob(".*"))


def _save_on_a_stuck_disk(rank: int, world_size: int, port: int, args: Any) -> str:
    from slime.backends.megatron import checkpoint_format

    write = checkpoint_format.CheckpointWriter.write
    checkpoint_format.CheckpointWriter.write = lambda self: (time.sleep(30 * rank), write(self))[1]  # type: ignore[method-assign]
    trainer = _trainer(rank, world_size, port, args)
    trainer.init()
    trainer.save(0)
    try:
        trainer.finish_saves(0.1)
    except TimeoutError as error:
        return str(error)
    return ""


def test_the_deadline_of_a_save_names_the_rank_that_is_late(ranks: RankPool, model: Path, tmp_path: Path) -> None:
    args = tiny.training_args(model, save=str(tmp_path), async_save=True)
    for error in ranks.run(_save_on_a_stuck_disk, 2, args):
        assert "Training rank 1 was still writing its 0.00 GiB of the checkpoint of rollout 0" in error
    assert cf.find_checkpoint(tmp_path) is None


# --- the disk --------------------------------------------------------------------------------------------------------


def _save_on_a_full_disk(rank: int, world_size: int, port: int, args: Any) -> str:
    import shutil

    usage = shutil.disk_usage(args.save)
    shutil.disk_usage = lambda path: usage._replace(free=70 << 20)  # type: ignore[assignment]
    trainer = _trainer(rank, world_size, port, args)
    trainer.init()
    try:
        trainer.save(0)
    except OSError as error:
        return str(error)
    return ""


def test_no_save_begins_on_a_disk_that_is_too_small(ranks: RankPool, tmp_path: Path) -> None:
    model = tiny.save_hf_model(tmp_path / "model", "llama", intermediate_size=4096)
    save = tmp_path / "save"
    save.mkdir()
    for error in ranks.run(_save_on_a_full_disk, 2, tiny.training_args(model, save=str(save))):
        assert "The checkpoint of rollout 0 needs 0.08 GiB, but" in error
        assert "has 0.07 GiB free. Nothing was written." in error and "--keep-last" in error
    assert list(save.iterdir()) == []


def test_keep_last_leaves_the_newest_and_what_the_run_started_from(
    ranks: RankPool, model: Path, tmp_path: Path
) -> None:
    save = str(tmp_path)
    ranks.run(_train_and_save, 1, tiny.training_args(model, save=save), ROLLOUTS)
    args = tiny.training_args(model, save=save, load=save, ckpt_step=1, keep_last=1)
    ranks.run(_train_and_save, 1, args, ROLLOUTS)
    assert cf.complete_iterations(tmp_path) == [1, 4]
    assert cf.find_checkpoint(tmp_path) == cf.Checkpoint(tmp_path, 4)


def _save_beside_a_slow_deletion(rank: int, world_size: int, port: int, args: Any) -> tuple[list[str], str]:
    import threading

    from slime.backends.megatron import checkpoint

    gate, keep_newest, seen = threading.Event(), checkpoint.keep_newest, []

    def delete(*arguments: Any) -> Any:
        gate.wait(5)
        seen.append("deleted")
        return keep_newest(*arguments)

    def fail(*arguments: Any) -> Any:
        raise OSError(30, "Read-only file system")

    checkpoint.keep_newest = delete
    trainer = _trainer(rank, world_size, port, args)
    trainer.init()
    gate.set()
    trainer.save(0)
    trainer.finish_saves()
    gate.clear()
    trainer.save(1)
    trainer.job._saver._pending._thread.join()
    trainer.train(2, tiny.shard_of(trainer, ROLLOUTS[0]))
    seen.append("trained")
    gate.set()
    trainer.save(2)
    seen.append("saved")
    checkpoint.keep_newest = fail
    try:
        trainer.finish_saves()
    except OSError as error:
        return seen, str(error)
    return seen, ""


def test_training_goes_on_while_an_old_checkpoint_is_deleted(ranks: RankPool, model: Path, tmp_path: Path) -> None:
    """The next save waits, as it needs the room; what cannot be deleted is told by every rank."""
    args = tiny.training_args(model, save=str(tmp_path), async_save=True, keep_last=1)
    (seen, *errors), (others, *others_errors) = ranks.run(_save_beside_a_slow_deletion, 2, args)
    assert seen == ["deleted", "trained", "deleted", "saved"]
    assert others == ["trained", "saved"]
    assert errors == others_errors == ["[Errno 30] Read-only file system"]
    assert cf.complete_iterations(tmp_path) == [1, 2]


# --- killed ----------------------------------------------------------------------------------------------------------


def _save_until_killed(rank: int, world_size: int, port: int, args: Any, delay_s: float) -> None:
    trainer = _trainer(rank, world_size, port, args)
    start = trainer.init()
    trainer.train(start, tiny.shard_of(trainer, ROLLOUTS[0]))
    signal.setitimer(signal.ITIMER_REAL, delay_s)  # whose signal ends the process where it stands
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for i in range(start, start + 1000):
        trainer.save(i)


@pytest.mark.parametrize("async_save", [False, True], ids=["waiting", "background"])
def test_a_trainer_killed_while_it_saves_goes_on_from_a_whole_checkpoint(
    ranks: RankPool, model: Path, tmp_path: Path, async_save: bool
) -> None:
    seed = random.randrange(2**32)
    print("seed of the moments:", seed)
    moments = random.Random(seed)
    args = tiny.training_args(model, save=str(tmp_path), load=str(tmp_path), async_save=async_save, keep_last=2)
    expected = 0
    for _ in range(3):
        with pytest.raises(RankError, match="died"):
            ranks.run(_save_until_killed, 1, args, moments.uniform(0.05, 0.4))
        found = cf.find_checkpoint(tmp_path)
        newest = -1 if found is None else found.iteration
        assert newest is not None and newest >= expected - 1
        expected = newest + 1
        assert ranks.run(_train, 1, args, [])[0]["start"] == expected
    assert expected > 0


# --- what flags leave out --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(ranks: RankPool, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Two checkpoints of a schedule whose rate falls, and the weights at each."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, ranks.run(_train_and_save, 1, _falling(model, save=str(folder)), ROLLOUTS[:2])[0]


def _falling(model: Path, **changes: Any) -> Any:
    return tiny.training_args(model, lr_decay_style="linear", num_rollout=4, **changes)


def _load_and_look(rank: int, world_size: int, port: int, args: Any) -> dict[str, Any]:
    """What came with the weights: step counters, random states, learning rate of the next step."""
    torch.manual_seed(99)
    random.seed(99)
    fresh = torch.get_rng_state()
    trainer = _trainer(rank, world_size, port, args)
    start = trainer.init()
    is_fresh = torch.equal(fresh, torch.get_rng_state())
    (part,) = trainer.job.optimizer.chained_optimizers
    steps = {float(state["step"]) for state in part.optimizer.state.values()}
    weights = tiny.hf_weights(trainer)
    metrics = trainer.train(start, tiny.shard_of(trainer, ROLLOUTS[2]))
    found = {"start": start, "steps": steps, "weights": weights, "lr": metrics["train/lr-pg_0"], "is_fresh": is_fresh}
    return found | {"torch": torch.get_rng_state(), "python": random.getstate()}


@pytest.mark.parametrize(
    ("flags", "start", "steps", "lr"),
    [
        ({}, 2, {2.0}, 0.25e-2),
        ({"ckpt_step": 0}, 1, {1.0}, 0.5e-2),
        ({"no_load_rng": True}, 2, {2.0}, 0.25e-2),
        ({"no_load_optim": True}, 2, set(), 0.75e-2),
        ({"finetune": True}, 0, set(), 0.75e-2),
        ({"start_rollout_id": 7}, 7, {2.0}, 0.25e-2),
        ({"lr": 2e-2}, 2, {2.0}, 0.5e-2),
        ({"lr": 2e-2, "use_checkpoint_opt_param_scheduler": True}, 2, {2.0}, 0.25e-2),
    ],
    ids=lambda value: ", ".join(value) or "everything" if isinstance(value, dict) else None,
)
def test_flags_choose_what_is_loaded(
    ranks: RankPool,
    model: Path,
    saved: tuple[Path, list[Any]],
    flags: dict[str, Any],
    start: int,
    steps: set[float],
    lr: float,
) -> None:
    """lr is the rate that the step leaves behind: 1e-2 falls by a quarter of itself a step."""
    folder, weights = saved
    found = ranks.run(_load_and_look, 1, _falling(model, load=str(folder), **flags))[0]
    assert found["start"] == start
    assert found["steps"] == steps
    assert found["lr"] == pytest.approx(lr)
    assert tiny.largest_difference(found["weights"], weights[flags.get("ckpt_step", 1)]) == 0


def _random_states(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    """Draw from each generator before saving; what is drawn after."""
    import numpy as np

    trainer = _trainer(rank, world_size, port, args)
    start = trainer.init()
    for i, data in enumerate(rollouts):
        random.random(), np.random.rand(), torch.rand(1)
        trainer.train(start + i, tiny.shard_of(trainer, data))
        trainer.save(start + i)
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def test_random_states_come_back_unless_told_not_to(ranks: RankPool, model: Path, tmp_path: Path) -> None:
    save = str(tmp_path)
    drawn = ranks.run(_random_states, 2, tiny.training_args(model, save=save), ROLLOUTS[:1])
    assert ranks.run(_random_states, 2, tiny.training_args(model, load=save), []) == drawn
    others = ranks.run(_random_states, 2, tiny.training_args(model, load=save, no_load_rng=True), [])
    assert all(ours != theirs for ours, theirs in zip(others[0], drawn[0], strict=True))


def test_a_checkpoint_without_optimizer_asks_for_the_flag(ranks: RankPool, model: Path, tmp_path: Path) -> None:
    save = str(tmp_path)
    weights = ranks.run(_train_and_save, 1, tiny.training_args(model, save=save, no_save_optim=True), ROLLOUTS[:1])[0]
    with pytest.raises(RankError, match="was saved without the optimizer .*give --no-load-optim"):
        ranks.run(_train, 1, tiny.training_args(model, load=save), [])
    loaded = ranks.run(_train, 1, tiny.training_args(model, load=save, no_load_optim=True), [])[0]
    assert loaded["start"] == 1
    assert tiny.largest_difference(loaded["weights"], weights[0]) == 0


# --- what is never read ----------------------------------------------------------------------------------------------


class _Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._witness),)


def _put_bomb_in_common(path: Path, witness: Path) -> None:
    common = torch.load(path / "common.pt", weights_only=True)
    torch.save(common | {"args": _Bomb(witness)}, path / "common.pt")


def _put_bomb_in_metadata(path: Path, witness: Path) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = _Bomb(witness)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _put_bomb_in_objects(path: Path, witness: Path) -> None:
    """Megatron keeps an empty object a layer among the tensors, and unpickles it."""
    data = (path / "__0_0.distcp").read_bytes()
    assert b"_extra_state" in (path / ".metadata").read_bytes()
    metadata = pickle.loads((path / ".metadata").read_bytes())
    torch.save([_Bomb(witness)], path / "bomb.pt")
    bomb = (path / "bomb.pt").read_bytes()
    for index, info in metadata.storage_data.items():
        if "_extra_state" in index.fqn:
            info.offset, info.length = len(data), len(bomb)
    (path / "__0_0.distcp").write_bytes(data + bomb)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.fixture
def foreign(ranks: RankPool, model: Path, tmp_path: Path) -> Path:
    """A checkpoint of another program: without slime's record."""
    ranks.run(_train_and_save, 1, tiny.training_args(model, save=str(tmp_path)), ROLLOUTS[:1])
    (tmp_path / "iter_0000000" / cf.RECORD_FILE).unlink()
    return tmp_path


@pytest.mark.parametrize("plant", [_put_bomb_in_common, _put_bomb_in_metadata])
def test_a_checkpoint_that_could_run_code_is_refused_unless_allowed(
    ranks: RankPool, model: Path, foreign: Path, plant: Any
) -> None:
    witness = foreign / "witness"
    plant(foreign / "iter_0000000", witness)
    with pytest.raises(RankError, match="holds more than plain data .*--allow-pickle-checkpoints"):
        ranks.run(_train, 1, tiny.training_args(model, load=str(foreign)), [])
    assert not witness.exists()
    allowed = tiny.training_args(model, load=str(foreign), allow_pickle_checkpoints=True)
    with pytest.raises(RankError, match="File exists"):  # common.pt is read twice
        ranks.run(_train, 1, allowed, [])
        ranks.run(_train, 1, allowed, [])
    assert witness.exists()


class _Pickler3112(pickle.Pickler):
    """Writes members of enumerations as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


class _Reach:
    """What `getattr` gives of a harmless class."""

    def __reduce__(self) -> Any:
        return getattr, (Metadata, "__init__")


def test_a_checkpoint_of_an_older_python_is_read_and_getattr_reaches_nothing_else(
    ranks: RankPool, model: Path, foreign: Path
) -> None:
    path = foreign / "iter_0000000" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for planner_data in (metadata.planner_data, _Reach()):
        metadata.planner_data = planner_data
        with path.open("wb") as file:
            _Pickler3112(file).dump(metadata)
        assert b"getattr" in path.read_bytes()
        if isinstance(planner_data, _Reach):
            with pytest.raises(RankError, match="it names builtins.getattr for '__init__' of"):
                ranks.run(_train, 1, tiny.training_args(model, load=str(foreign)), [])
        else:
            assert ranks.run(_train, 1, tiny.training_args(model, load=str(foreign)), [])[0]["start"] == 1


def test_objects_among_the_tensors_are_not_read(ranks: RankPool, model: Path, foreign: Path) -> None:
    witness = foreign / "witness"
    _put_bomb_in_objects(foreign / "iter_0000000", witness)
    assert ranks.run(_train, 1, tiny.training_args(model, load=str(foreign)), [])[0]["start"] == 1
    assert not witness.exists()


def test_what_is_saved_is_plain_data(ranks: RankPool, model: Path, foreign: Path) -> None:
    common = torch.load(foreign / "iter_0000000" / "common.pt", weights_only=True)
    assert common["iteration"] == 0 and common["has_optimizer"] is True
    json.loads((foreign / "iter_0000000" / "metadata.json").read_text())
