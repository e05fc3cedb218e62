"""Whether trainer and engines stay on a GPU that they share: what fits stays, what does not takes turns."""

import dataclasses
from typing import Any

import pytest

from slime.config import Machine
from slime.config.batches import batch_arithmetic
from slime.config.config import Config
from slime.config.devices import Choice, Parallel, Placement, place
from slime.config.memory import GIB, MemoryPlan, divide_memory, trainer_memory
from tests.unit.config.test_resolve import config

SMALL = {  # 0.5 billion parameters
    "num_layers": 24, "hidden_size": 896, "ffn_hidden_size": 4864, "num_attention_heads": 14, "num_query_groups": 2,
    "kv_channels": 64, "vocab_size": 151936, "untie_embeddings_and_output_weights": False, "add_qkv_bias": True,
}  # fmt: skip
LARGE = SMALL | {
    "num_layers": 48, "hidden_size": 5120, "ffn_hidden_size": 13824, "num_attention_heads": 40, "num_query_groups": 8,
    "kv_channels": 128, "untie_embeddings_and_output_weights": True,
}  # fmt: skip
ALONE = Parallel(1, 1, 1, 1, 1, None)


def on_a_gpu(memory_gib: int | None = 140, **values: Any) -> Config:
    memory = None if memory_gib is None else memory_gib * GIB
    machine = Machine(cores=16, num_gpus=1, gpu_memory_bytes=memory, has_sglang=True)
    defaults = {"colocate": True, "actor_num_gpus_per_node": 1, "use_dynamic_batch_size": True}
    return config(machine, **(defaults | {"max_tokens_per_gpu": 16384} | values))


def divided(values: dict[str, Any], asked: Config, parallel: Parallel = ALONE) -> tuple[Placement, MemoryPlan]:
    placement = place(asked, Choice("cuda", ""), Choice("sglang", ""))
    placement, memory = divide_memory(asked, placement, parallel, batch_arithmetic(asked), values)
    assert memory is not None
    return placement, memory


@pytest.mark.parametrize(
    ("words", "staying"),
    [
        ({"offload_rollout": False}, "the engine stays"),
        ({"offload_train": False}, "the trainer stays"),
        ({"offload_train": False, "offload_rollout": False}, "the trainer and the engine stay"),
    ],
)
def test_whoever_stays_leaves_the_other_its_share(words: dict[str, bool], staying: str) -> None:
    """By itself SGLang takes nine tenths of what is free when it starts, which is before the trainer."""
    placement, memory = divided(SMALL, on_a_gpu(80, **words))
    assert memory is not None and staying in memory.words
    assert placement.engine_memory_fraction is not None and placement.engine_memory_fraction <= 0.5


def test_a_small_model_and_its_engine_stay_on_a_large_gpu() -> None:
    placement, memory = divided(SMALL, on_a_gpu())
    assert (placement.offload_train, placement.offload_rollout) == (False, False)
    assert placement.engine_memory_fraction == memory.engine_fraction == 0.5
    assert "both fit" in memory.words


@pytest.mark.parametrize(
    ("values", "asked"),
    [(SMALL, on_a_gpu(24)), (LARGE, on_a_gpu()), (SMALL, on_a_gpu(None)), (SMALL, on_a_gpu(offload=True))],
    ids=["a small GPU", "a large model", "a GPU of unknown size", "turns are asked for"],
)
def test_otherwise_they_take_turns(values: dict[str, Any], asked: Config) -> None:
    placement, memory = divided(values, asked)
    assert (placement.offload_train, placement.offload_rollout) == (True, True)
    assert placement.engine_memory_fraction is None and not memory.stays


@pytest.mark.parametrize(("gpus_an_engine", "stay"), [(1, False), (2, True)])
def test_an_engine_stays_only_if_its_own_weights_fit_into_its_share(gpus_an_engine: int, stay: bool) -> None:
    """14 billion parameters, of which a trainer rank of eight has an eighth and an engine of one GPU all, 27 GiB."""
    asked = on_a_gpu(96, max_tokens_per_gpu=4096, actor_num_gpus_per_node=8, rollout_num_gpus_per_engine=gpus_an_engine)
    asked = dataclasses.replace(asked, machine=dataclasses.replace(asked.machine, num_gpus=8))
    placement, memory = divided(LARGE, asked, Parallel(8, 1, 1, 1, 1, None))
    assert memory.stays is stay
    assert placement.offload_rollout is not stay


def test_a_share_that_the_user_gives_the_engine_decides() -> None:
    asked = on_a_gpu()
    share = {"sglang_mem_fraction_static": 0.8}
    wide = dataclasses.replace(asked, sglang=share, given=asked.given | set(share))
    placement, _ = divided(SMALL, wide)
    assert placement.offload_train
    assert placement.engine_memory_fraction is None


def test_recomputation_and_more_ranks_need_less() -> None:
    asked = on_a_gpu()
    batch = batch_arithmetic(asked)
    whole = trainer_memory(asked, ALONE, batch, SMALL)
    assert whole > trainer_memory(asked, Parallel(1, 1, 1, 8, 1, None), batch, SMALL)
    assert whole > trainer_memory(asked, Parallel(2, 1, 1, 1, 1, None), batch, SMALL)
    assert whole > 2 * trainer_memory(asked, ALONE, batch, SMALL | {"recompute_granularity": "full"})
    assert 20 * GIB < whole < 60 * GIB


def test_the_ways_out_of_too_little_memory_show_in_the_estimate() -> None:
    asked = on_a_gpu(use_dynamic_batch_size=False, micro_batch_size=4, rollout_max_response_len=4096)
    batch = batch_arithmetic(asked)
    whole = trainer_memory(asked, ALONE, batch, SMALL)
    mlp = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
    assert whole > 1.2 * trainer_memory(asked, ALONE, batch, SMALL | mlp)
    one = on_a_gpu(use_dynamic_batch_size=False, micro_batch_size=1, rollout_max_response_len=4096)
    assert whole > 2 * trainer_memory(one, ALONE, batch_arithmetic(one), SMALL)
    sliced = Parallel(2, 1, 1, 1, 1, None)
    by_tensor = trainer_memory(asked, sliced, batch, SMALL)
    assert whole > by_tensor > trainer_memory(asked, sliced, batch, SMALL | {"sequence_parallel": True})


def test_a_trainer_with_gpus_of_its_own_has_an_estimate_too() -> None:
    placement, memory = divided(SMALL, on_a_gpu(141, colocate=False, actor_num_gpus_per_node=1, debug_train_only=True))
    assert memory.words.endswith(" GiB of 141 GiB") and not placement.offload_train


def test_a_trainer_that_no_gpu_holds_is_told_what_helps() -> None:
    _, memory = divided(LARGE, on_a_gpu(24))
    assert "but a GPU has 24" in memory.words and "--recompute-granularity full" in memory.words
