"""A trainer sleeps, wakes, saves, comes back, and lets itself be hooked into, without a number changing."""

import gc
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import tiny
from tests.distributed.pool import RankPool

ROLLOUTS = [tiny.rollout(seed=seed) for seed in (1, 2, 3)]
_HERE = __name__


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf_model(tmp_path_factory.mktemp("model"), "qwen2", tie_word_embeddings=False)


def _train(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    return tiny.train(args, rank, world_size, port, rollouts)


def _train_with_naps(rank: int, world_size: int, port: int, args: Any) -> Any:
    from slime.backends.megatron.trainer import MegatronTrainer

    trainer = MegatronTrainer(args, rank, world_size, "127.0.0.1", port)
    trainer.init()
    before = tiny.hf_weights(trainer)
    trainer.sleep()
    trainer.sleep()
    asleep = tiny.hf_weights(trainer)  # engines are given the weights while the trainer sleeps
    gradient_bytes = sum(b.grad_data.untyped_storage().nbytes() for b in trainer.job.models[0].buffers)
    for i, data in enumerate(ROLLOUTS):
        trainer.wake_up()
        trainer.train(i, tiny.shard_of(trainer, data))
        trainer.sleep()
    return before, asleep, gradient_bytes, tiny.hf_weights(trainer)


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_sleeping_frees_the_gradients_and_changes_nothing(
    ranks: RankPool, model: Path, distributed_optimizer: bool
) -> None:
    args = tiny.training_args(model, use_distributed_optimizer=distributed_optimizer)
    before, asleep, gradient_bytes, after = ranks.run(_train_with_naps, 1, args)[0]
    awake = ranks.run(_train, 1, args, ROLLOUTS)[0]["weights"]
    assert tiny.largest_difference(before, asleep) == 0
    assert gradient_bytes == 0
    assert tiny.largest_difference(after, awake) == 0


def _train_as_if_on_a_gpu(rank: int, world_size: int, port: int, args: Any) -> Any:
    """As colocated on a GPU: optimizer states and weights wait in other memory, and what they lay in is given back."""
    from slime.backends.megatron import memory
    from slime.backends.megatron.trainer import MegatronTrainer

    on_device = memory._on_device
    memory._on_device = lambda tensors, but=(): [s for s in memory._storages(tensors) if s.data_ptr() not in but]
    try:
        trainer = MegatronTrainer(args, rank, world_size, "127.0.0.1", port)
        trainer.init()
        held, taken = [], []
        take_from = trainer.accelerator.pinned
        trainer.accelerator.pinned = lambda size: taken.append(size) or take_from(size)  # type: ignore[assignment]
        for i, data in enumerate(ROLLOUTS):
            trainer.wake_up()
            trainer.train(i, tiny.shard_of(trainer, data))
            trainer.sleep(keep_weights=True)
            in_the_sync = tiny.hf_weights(trainer)
            trainer.sleep()
            tensors = [*trainer.job.memory._parameters(), *trainer.job.memory._optimizer_tensors()]
            held.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
            with trainer.weights_at_hand():  # an engine that was started again is given the weights
                assert trainer.job.memory.lacks_weights is (rank > 0), "only what is read wakes"
                again = tiny.hf_weights(trainer)
                assert rank > 0 or tiny.largest_difference(again, in_the_sync) == 0
        needed = sum(buffer.numel() for kept in memory_of(trainer) for buffer in kept._buffers)
        trainer.wake_up()
        return tiny.hf_weights(trainer), held, taken, needed
    finally:
        memory._on_device = on_device


def memory_of(trainer: Any) -> tuple[Any, Any]:
    return trainer.job.memory._states, trainer.job.memory._weights


@pytest.mark.parametrize(
    ("changes", "num_ranks"),
    [({}, 1), ({"use_distributed_optimizer": False}, 1), ({"bf16": True}, 2)],
    ids=["fp32", "plain optimizer", "bf16, two replicas"],
)
def test_weights_and_optimizer_that_waited_elsewhere_come_back_bit_by_bit(
    ranks: RankPool, model: Path, changes: dict[str, Any], num_ranks: int
) -> None:
    args = tiny.training_args(model, **changes)
    after, held, taken, needed = ranks.run(_train_as_if_on_a_gpu, num_ranks, args)[0]
    awake = ranks.run(_train, num_ranks, args, ROLLOUTS)[0]["weights"]
    assert tiny.largest_difference(after, awake) == 0
    assert held == [0, 0, 0]
    assert len(taken) == 2, "the host's memory is taken once, for the states and for the weights"
    assert needed <= sum(taken) < 1.05 * needed + 100 * 512


def _nap_without_room(rank: int, world_size: int, port: int) -> str:
    from slime.backends.megatron import memory
    from slime.backends.megatron.accelerator import accelerator_for

    left, memory.host_memory_left = memory.host_memory_left, lambda: 1 << 30
    try:
        memory._OnHost(accelerator_for("cpu"))._buffers_for([1 << 30, 1])
    except MemoryError as error:
        return str(error)
    finally:
        memory.host_memory_left = left
    return ""


def test_a_host_without_room_for_a_sleeping_trainer_is_named(ranks: RankPool) -> None:
    """Else the system would kill the rank, without a word."""
    assert "keeps 1.0 GiB of it on the host" in (said := ranks.run(_nap_without_room, 1)[0])
    assert "has 1.0 GiB left" in said and "--no-offload-train" in said


def _resident_bytes_given_back(rank: int, world_size: int, port: int, args: Any) -> tuple[int, int]:
    from slime.backends.megatron.trainer import MegatronTrainer

    trainer = MegatronTrainer(args, rank, world_size, "127.0.0.1", port)
    trainer.init()
    trainer.train(0, tiny.shard_of(trainer, ROLLOUTS[0]))
    gc.collect()
    gradient_bytes = sum(b.grad_data.untyped_storage().nbytes() for b in trainer.job.models[0].buffers)
    before = trainer.accelerator.memory().used_bytes
    trainer.sleep()
    return gradient_bytes, before - trainer.accelerator.memory().used_bytes


def test_sleeping_gives_the_memory_back_to_the_machine(ranks: RankPool, tmp_path: Path) -> None:
    """By the operating system's count, not the allocator's."""
    folder = tiny.save_hf_model(tmp_path, "llama", hidden_size=96, intermediate_size=8192, num_hidden_layers=4)
    gradient_bytes, returned = ranks.run(_resident_bytes_given_back, 1, tiny.training_args(folder))[0]
    assert gradient_bytes > 30e6
    assert returned > 0.9 * gradient_bytes


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _train_and_save(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    from slime.backends.megatron.trainer import MegatronTrainer

    trainer = MegatronTrainer(args, rank, world_size, "127.0.0.1", port)
    start = trainer.init()
    for i, data in enumerate(rollouts):
        trainer.train(start + i, tiny.shard_of(trainer, data))
    trainer.save(start + len(rollouts) - 1)
    return tiny.hf_weights(trainer)


@pytest.mark.parametrize("distributed_optimizer", [True, False], ids=["distributed optimizer", "plain optimizer"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_loaded_checkpoint_goes_on_as_if_never_stopped(
    ranks: RankPool, model: Path, tmp_path: Path, distributed_optimizer: bool, bf16: bool
) -> None:
    """In bf16 too, where the optimizer's float32 weights hold digits that the model's do not."""
    changes: dict[str, Any] = dict(
        use_distributed_optimizer=distributed_optimizer, bf16=bf16, lr_decay_style="linear", lr_warmup_fraction=0.3,
        num_rollout=6,
    )  # fmt: skip
    args = tiny.training_args(model, save=str(tmp_path / "ckpt"), **changes)
    saved = ranks.run(_train_and_save, 1, args, ROLLOUTS[:2])[0]
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "1\n"
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == [
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
    ]

    resumed_args = tiny.training_args(model, load=str(tmp_path / "ckpt"), **changes)
    loaded = ranks.run(_train, 1, resumed_args, [])[0]
    assert loaded["start"] == 2
    assert tiny.largest_difference(saved, loaded["weights"]) == 0

    resumed = ranks.run(_train, 1, resumed_args, ROLLOUTS[2:])[0]
    whole = ranks.run(_train, 1, args, ROLLOUTS)[0]
    assert resumed["metrics"][0]["train/lr-pg_0"] == pytest.approx(whole["metrics"][2]["train/lr-pg_0"])
    assert tiny.largest_difference(resumed["weights"], whole["weights"]) == 0, "bit by bit"


def test_saving_again_replaces_and_a_finetuned_run_starts_over(ranks: RankPool, model: Path, tmp_path: Path) -> None:
    args = tiny.training_args(model, save=str(tmp_path), no_save_optim=True)
    saved = [ranks.run(_train_and_save, 1, args, ROLLOUTS[:1])[0] for _ in range(2)][1]
    new_run = tiny.training_args(model, load=str(tmp_path), finetune=True)
    loaded = ranks.run(_train, 1, new_run, [])[0]
    assert loaded["start"] == 0
    assert tiny.largest_difference(saved, loaded["weights"]) == 0


def test_a_tracker_that_names_nothing_is_explained(tmp_path: Path, ranks: RankPool, model: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5\n")
    with pytest.raises(AssertionError, match="names 5: .*iter_0000005 is not there"):
        ranks.run(_train, 1, tiny.training_args(model, load=str(tmp_path)), [])


def test_load_may_be_a_huggingface_folder(ranks: RankPool, model: Path, tmp_path: Path) -> None:
    other = tiny.save_hf_model(tmp_path, "qwen2", seed=9, tie_word_embeddings=False)
    loaded = ranks.run(_train, 1, tiny.training_args(model, load=str(other)), [])[0]
    direct = ranks.run(_train, 1, tiny.training_args(other), [])[0]
    assert loaded["start"] == 0
    assert tiny.largest_difference(loaded["weights"], direct["weights"]) == 0


# --- hooks and flags -------------------------------------------------------------------------------------------------

CALLS: list[Any] = []


def note_init(args: Namespace) -> None:
    CALLS.append("init")


def note_log_probs(args: Namespace, model: Any, store_prefix: str) -> None:
    CALLS.append(f"{store_prefix}log_probs")


def note_step(args: Namespace, rollout_id: int, step_id: int, model: Any, optimizer: Any, scheduler: Any) -> None:
    CALLS.append((rollout_id, step_id))


def double_rewards(args: Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    CALLS.append("postprocess")
    rollout_data["advantages"] = [2 * advantages for advantages in rollout_data["advantages"]]


def policy_gradient_from_logits(args: Namespace, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any) -> Any:
    """What a plug-in loss may do with all logits [1, T, V] of the plain packed layout."""
    start, picked = 0, []
    for ids, length in zip(batch["tokens"], batch["response_lengths"], strict=True):
        end = start + ids.numel()
        rows = torch.log_softmax(logits[0, end - length - 1 : end - 1], -1)
        picked.append(rows.gather(1, ids[-length:, None].to(rows.device)).squeeze(1))
        start = end
    log_probs = torch.cat(picked)
    loss = sum_of_sample_mean(-torch.exp(log_probs - log_probs.detach()) * torch.cat(batch["advantages"]))
    return loss, {"loss": loss.detach()}


def _train_noting_calls(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    CALLS.clear()
    return tiny.train(args, rank, world_size, port, rollouts) | {"calls": list(CALLS)}


def test_hooks_are_called_where_the_contract_says(ranks: RankPool, model: Path) -> None:
    args = tiny.training_args(
        model, use_kl_loss=True, kl_loss_coef=1e-9, global_batch_size=4, num_steps_per_rollout=2,
        custom_megatron_init_path=f"{_HERE}.note_init",
        custom_megatron_before_log_prob_hook_path=f"{_HERE}.note_log_probs",
        custom_megatron_before_train_step_hook_path=f"{_HERE}.note_step",
        rollout_data_postprocess_path=f"{_HERE}.double_rewards",
    )  # fmt: skip
    found = ranks.run(_train_noting_calls, 1, args, ROLLOUTS[:1])[0]
    assert found["calls"] == ["init", "ref_log_probs", "log_probs", "postprocess", (0, 0), (0, 1)]
    single = dict(use_distributed_optimizer=False, clip_grad=0.0)
    plain = ranks.run(_train, 1, tiny.training_args(model, **single), ROLLOUTS[:1])[0]
    doubled_args = tiny.training_args(model, rollout_data_postprocess_path=f"{_HERE}.double_rewards", **single)
    doubled = ranks.run(_train, 1, doubled_args, ROLLOUTS[:1])[0]
    twice = {name: 2 * gradient for name, gradient in plain["gradient"].items()}
    assert tiny.largest_difference(twice, doubled["gradient"]) < 1e-6


def test_a_custom_loss_gets_all_logits(ranks: RankPool, model: Path) -> None:
    single = dict(use_distributed_optimizer=False, clip_grad=0.0, rollout_temperature=0.9)
    built_in = ranks.run(_train, 1, tiny.training_args(model, **single), ROLLOUTS[:1])[0]
    path = f"{_HERE}.policy_gradient_from_logits"
    custom_args = tiny.training_args(model, loss_type="custom_loss", custom_loss_function_path=path, **single)
    custom = ranks.run(_train, 1, custom_args, ROLLOUTS[:1])[0]
    assert tiny.largest_difference(built_in["gradient"], custom["gradient"]) < 1e-6
    assert custom["metrics"][0]["train/loss"] == pytest.approx(built_in["metrics"][0]["train/loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("flag", "is_trained"),
    [
        ({"only_train_params_name_list": [r"layers\.1\.mlp"]}, lambda name: "layers.1.mlp" in name),
        (
            {"freeze_params_name_list": ["embedding", "layernorm"]},
            lambda name: "embed" not in name and "norm" not in name,
        ),
    ],
    ids=["only train", "freeze"],
)
def test_frozen_parameters_stay(ranks: RankPool, model: Path, flag: dict[str, Any], is_trained: Any) -> None:
    before = ranks.run(_train, 1, tiny.training_args(model), [])[0]["weights"]
    after = ranks.run(_train, 1, tiny.training_args(model, **flag), ROLLOUTS[:1])[0]["weights"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if is_trained(name)}


def test_sft_trains_on_the_likelihood_of_the_responses(ranks: RankPool, model: Path) -> None:
    args = tiny.training_args(
        model, loss_type="sft_loss", compute_advantages_and_returns=False, calculate_per_token_loss=True
    )
    found = ranks.run(_train, 1, args, [ROLLOUTS[0]] * 3)[0]
    losses = [metrics["train/loss"] for metrics in found["metrics"]]
    assert losses[0] > losses[1] > losses[2] > 0
