"""A checkpoint is not bound to the number of ranks that wrote it, nor to how they divided the work."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.pool import RankPool

ROLLOUTS = [tiny.rollout(seed=1), tiny.rollout(seed=2)]
TP2_PP2: dict[str, Any] = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
TP2: dict[str, Any] = dict(tensor_model_parallel_size=2, sequence_parallel=True)
CHUNKS: dict[str, Any] = dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
"""Two pipeline stages that hold two chunks of layers each."""


def _train(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    return tiny.train(args, rank, world_size, port, rollouts)


def _train_and_save(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    from slime.backends.megatron.trainer import MegatronTrainer

    trainer = MegatronTrainer(args, rank, world_size, "127.0.0.1", port)
    trainer.init()
    for i, data in enumerate(rollouts):
        trainer.train(i, tiny.shard_of(trainer, data))
    trainer.save(len(rollouts) - 1)
    trainer.finish_saves()
    trainer.save_hf(f"{args.save}/hf")
    return tiny.hf_weights(trainer)


def _random_model(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A model whose sizes nothing divides but what must; four layers, for four chunks."""
    seed = random.randrange(2**32)
    print("seed of the shape:", seed)
    choose = random.Random(seed)
    heads, groups, head_dim = choose.choice([(4, 2), (8, 4), (6, 2)]) + (choose.choice([8, 12]),)
    shape = dict(
        hidden_size=heads * head_dim, intermediate_size=choose.randrange(30, 70) * 2, num_hidden_layers=4,
        num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=choose.random() < 0.5,
    )  # fmt: skip
    family = choose.choice(["llama", "qwen2"])
    flags = dict(
        num_layers=4, hidden_size=shape["hidden_size"], ffn_hidden_size=shape["intermediate_size"],
        num_attention_heads=heads, num_query_groups=groups, kv_channels=head_dim,
    )  # fmt: skip
    return tiny.save_hf_model(folder, family, **shape), flags


@pytest.mark.parametrize(
    ("saved_by", "saving", "loaded_by", "loading"),
    [
        (4, TP2_PP2, 2, {}),
        (2, {}, 4, TP2_PP2),
        (3, {}, 2, TP2),
        (2, CHUNKS, 4, TP2),
        (4, TP2, 2, CHUNKS),
    ],
    ids=["TP2 x PP2 to DP2", "DP2 to TP2 x PP2", "DP3 to TP2", "PP2 x 2 chunks to TP2 x DP2", "and back"],
)
def test_a_run_goes_on_in_another_layout(
    ranks: RankPool, tmp_path: Path, saved_by: int, saving: dict[str, Any], loaded_by: int, loading: dict[str, Any]
) -> None:
    """Weights, Adam's states, the falling learning rate: the next step is the one of a process that never stopped."""
    model, shape = _random_model(tmp_path / "model")
    size = dict(num_groups=6, samples_per_group=2)
    rollouts = [tiny.rollout(seed=3, **size), tiny.rollout(seed=4, **size)]
    common: dict[str, Any] = shape | dict(lr_decay_style="linear", num_rollout=4, rollout_batch_size=6)

    def args(**changes: Any) -> Any:
        made = tiny.training_args(model, global_batch_size=12, **changes)
        vars(made).update(common)
        return made

    save = str(tmp_path / "ckpt")
    ranks.run(_train_and_save, saved_by, args(save=save, async_save=True, **saving), rollouts[:1])
    resumed = ranks.run(_train, loaded_by, args(load=save, **loading), rollouts[1:])[0]
    whole = ranks.run(_train, 1, args(), rollouts)[0]
    assert resumed["start"] == 1
    assert tiny.largest_difference(resumed["weights"], whole["weights"]) < 1e-6
    for name in ("train/lr-pg_0", "train/grad_norm", "train/loss"):
        assert resumed["metrics"][0][name] == pytest.approx(whole["metrics"][1][name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, {}), (3, {}), (4, TP2_PP2), (2, CHUNKS)],
    ids=["DP2", "DP3", "TP2 x PP2", "PP2 x 2 chunks"],
)
def test_a_run_goes_on_bit_by_bit_in_its_own_layout(
    ranks: RankPool, tmp_path: Path, world_size: int, layout: dict[str, Any]
) -> None:
    model, shape = _random_model(tmp_path / "model")
    size = dict(num_groups=6, samples_per_group=2)
    rollouts = [tiny.rollout(seed=seed, **size) for seed in (3, 4, 5)]

    def args(**changes: Any) -> Any:
        made = tiny.training_args(model, global_batch_size=12, bf16=True, **layout, **changes)
        vars(made).update(shape | {"rollout_batch_size": 6})
        return made

    save = str(tmp_path / "ckpt")
    ranks.run(_train_and_save, world_size, args(save=save), rollouts[:2])
    resumed = ranks.run(_train, world_size, args(load=save), rollouts[2:])[0]
    whole = ranks.run(_train, world_size, args(), rollouts)[0]
    assert tiny.largest_difference(resumed["weights"], whole["weights"]) == 0


@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}], ids=["data parallel", "tensor parallel"])
def test_two_ranks_save_and_one_goes_on(ranks: RankPool, tmp_path: Path, layout: dict[str, int]) -> None:
    """An odd vocabulary, which two ranks pad. The HuggingFace export is the same weights."""
    model = tiny.save_hf_model(tmp_path / "model", "llama")
    save = str(tmp_path / "ckpt")
    saved = ranks.run(_train_and_save, 2, tiny.training_args(model, save=save, **layout), ROLLOUTS[:1])[0]
    resumed = ranks.run(_train, 1, tiny.training_args(model, load=save), ROLLOUTS[1:])[0]
    whole = ranks.run(_train, 1, tiny.training_args(model), ROLLOUTS)[0]
    assert resumed["start"] == 1
    assert tiny.largest_difference(resumed["weights"], whole["weights"]) < 1e-6
    exported = ranks.run(_train, 1, tiny.training_args(tmp_path / "ckpt" / "hf"), [])[0]["weights"]
    assert tiny.largest_difference(exported, saved) == 0
