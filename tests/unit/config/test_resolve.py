"""`resolve` turns a configuration into a plan; it decides from its argument alone."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.config import Config, ConfigError, Files, Machine, Plan, resolve
from slime.config.config import FULLY_ASYNC_ROLLOUT
from slime.config.eval_datasets import EvalDatasetConfig
from slime.config.files import CheckpointKind
from tests.unit.arguments.wrong_command_lines import TINY_QWEN3

LAPTOP = Machine(cores=4, started="20260101-120000", working_dir="/project")
GPU_BOX = Machine(cores=64, num_gpus=8, has_sglang=True, started="20260101-120000", working_dir="/project")
MINIMUM = {
    "hf_checkpoint": "model",
    "prompt_data": "prompts.jsonl",
    "rm_type": "math",
    "rollout_batch_size": 4,
    "n_samples_per_prompt": 8,
    "num_rollout": 3,
}


def config(
    machine: Machine = LAPTOP,
    checkpoints: dict[str, CheckpointKind] | None = None,
    first_row: dict[str, Any] | None = None,
    loop: Any = "sync",
    eval_datasets: tuple[EvalDatasetConfig, ...] = (),
    **values: Any,
) -> Config:
    """A configuration that can run, with some flags more."""
    said = MINIMUM | values
    files = Files({"model": "huggingface"} | (checkpoints or {}), TINY_QWEN3, first_row)
    return Config.from_values(
        said,
        given=frozenset(said),
        machine=machine,
        files=files,
        megatron=values,
        loop=loop,
        eval_datasets=eval_datasets,
    )


def plan(*args: Any, **values: Any) -> Plan:
    return resolve(config(*args, **values))


def test_equal_configurations_give_equal_plans() -> None:
    asked = config(save_interval=2, use_kl_loss=True)
    assert resolve(asked) == resolve(asked)


# ---- lengths ----


@pytest.mark.parametrize(
    ("lengths", "response"),
    [
        ({}, 1024),
        ({"rollout_max_response_len": 7}, 7),
        ({"rollout_max_context_len": 64}, 64),
        ({"rollout_max_context_len": 64, "rollout_max_response_len": 7}, 7),
    ],
)
def test_a_response_always_has_a_longest_length(lengths: dict[str, int], response: int) -> None:
    """Where only the context is bounded, a request ends there; where nothing is, the plan says what was taken."""
    tasks = (EvalDatasetConfig("a", "a.jsonl"), EvalDatasetConfig("b", "b.jsonl", max_response_len=5))
    p = plan(eval_interval=1, eval_datasets=tasks, **lengths)
    assert p.updates["rollout_max_response_len"] == response
    assert [task.max_response_len for task in p.updates["eval_datasets"]] == [response, 5]
    assert ("--rollout-max-response-len: 1024 tokens where it is not given" in p.notes) is (lengths == {})
    assert tasks[0].max_response_len is None


# ---- devices, engine, number format ----


def test_a_node_that_has_fewer_gpus_than_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="--actor-num-gpus-per-node 8 .* --num-gpus-per-node 4; .*--actor-num-nodes"):
        plan(GPU_BOX, colocate=True, actor_num_gpus_per_node=8, num_gpus_per_node=4)


def test_a_gpu_that_is_not_used_is_not_denied() -> None:
    assert plan(GPU_BOX, device="cpu").engine.reason == "on the CPU"
    assert plan().engine.reason == "no GPU"


def test_files_of_a_sync_that_uses_none_are_noted() -> None:
    note = "--update-weight-disk-dir has no effect without --update-weight-transport disk"
    assert note in plan(update_weight_disk_dir="w").notes
    assert note not in plan(update_weight_disk_dir="w", update_weight_transport="disk").notes


def test_a_laptop_takes_one_trainer_and_one_engine() -> None:
    p = plan()
    assert (p.device.value, p.engine.value, p.dtype.value) == ("cpu", "embedded", "fp32")
    assert (p.placement.world_size, p.placement.num_engines) == (1, 1)
    assert p.updates["distributed_backend"] == "gloo"
    assert any("--actor-num-gpus-per-node: 1 on the CPU" in note for note in p.notes)


def test_a_gpu_with_sglang_takes_both() -> None:
    p = plan(GPU_BOX, actor_num_gpus_per_node=4, rollout_num_gpus=4)
    assert (p.device.value, p.engine.value, p.dtype.value) == ("cuda", "sglang", "bf16")
    assert p.updates["distributed_backend"] == "nccl"


def test_a_gpu_without_sglang_takes_the_embedded_engine() -> None:
    machine = Machine(cores=8, num_gpus=1)
    assert plan(machine, actor_num_gpus_per_node=1, colocate=True).engine.value == "embedded"


def test_generation_on_gpus_must_be_given_devices() -> None:
    with pytest.raises(ConfigError, match="--rollout-num-gpus is missing.*--colocate"):
        plan(GPU_BOX, actor_num_gpus_per_node=4)


@pytest.mark.parametrize(
    ("instructions", "values", "dtype", "reason"),
    [
        (("avx512_bf16",), {}, "bf16", "the CPU has avx512_bf16"),
        ((), {}, "fp32", "neither avx512_bf16 nor amx_bf16"),
        ((), {"bf16": True}, "fp32", "--bf16 was asked for, but"),
        (("amx_bf16",), {"bf16": False}, "fp32", "--no-bf16"),
    ],
)
def test_a_cpu_computes_in_bf16_only_where_it_can(
    instructions: tuple[str, ...], values: dict[str, bool], dtype: str, reason: str
) -> None:
    p = plan(Machine(cores=2, cpu_instructions=instructions), **values)
    assert p.dtype.value == dtype
    assert reason in p.dtype.reason
    assert p.updates["bf16"] is (dtype == "bf16")


def test_a_gpu_does_not_train_in_float32() -> None:
    """Its attention kernels would say so in the first step, minutes later."""
    with pytest.raises(ConfigError, match="--no-bf16 leaves float32.*give --fp16"):
        plan(GPU_BOX, actor_num_gpus_per_node=4, rollout_num_gpus=4, bf16=False)


def test_too_few_devices_shows_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"needs 20 devices .* has 16 CPU devices"):
        plan(actor_num_gpus_per_node=10, rollout_num_gpus=10)


def test_a_running_cluster_decides_for_itself_how_many_devices_there_are() -> None:
    machine = Machine(cores=4, joins_cluster=True)
    p = plan(machine, actor_num_nodes=16, actor_num_gpus_per_node=8, rollout_num_gpus=128, global_batch_size=32,
             use_dynamic_batch_size=True, max_tokens_per_gpu=512, tensor_model_parallel_size=2,
             context_parallel_size=4)  # fmt: skip
    assert p.placement.devices_needed == 256
    assert p.placement.devices_available is None


@given(
    cores=st.integers(1, 64),
    ranks=st.integers(1, 8),
    engines=st.integers(1, 8),
    loop=st.sampled_from(["sync", "async"]),
)
def test_threads_of_processes_that_compute_together_fit_the_cores(
    cores: int, ranks: int, engines: int, loop: str
) -> None:
    """More processes than cores get one thread each; otherwise no core has two threads."""
    machine = Machine(cores=cores)
    p = plan(machine, loop=loop, actor_num_gpus_per_node=ranks, rollout_num_gpus=engines, cpu_devices=16,
             use_dynamic_batch_size=True, max_tokens_per_gpu=512).placement  # fmt: skip
    assert p.rollout_threads == 1
    together = ranks * p.train_threads + (engines if loop == "async" else 0)
    assert p.train_threads == 1 or together <= cores
    if loop == "sync":
        assert (p.train_threads + 1) * ranks > cores


def test_colocated_phases_take_turns_and_release_their_memory() -> None:
    p = plan(colocate=True, actor_num_gpus_per_node=2).placement
    assert (p.rollout_num_gpus, p.devices_needed) == (2, 2)
    assert (p.offload_train, p.offload_rollout) == (True, True)


def test_an_offload_that_is_refused_stays_off() -> None:
    p = plan(colocate=True, actor_num_gpus_per_node=2, offload_train=False).placement
    assert (p.offload_train, p.offload_rollout) == (False, True)


def test_a_critic_shares_the_actors_devices() -> None:
    p = plan(advantage_estimator="ppo")
    assert p.updates["use_critic"]
    assert p.updates["offload_train"]
    assert p.updates["critic_num_gpus_per_node"] == p.updates["actor_num_gpus_per_node"] == 1


def test_generation_alone_takes_all_devices() -> None:
    p = plan(debug_rollout_only=True, rollout_num_gpus=4, colocate=True)
    assert (p.placement.actor_num_nodes, p.placement.actor_num_gpus_per_node) == (1, 4)
    assert not p.placement.colocate
    assert p.placement.devices_needed == 4


def test_training_alone_starts_no_engine() -> None:
    p = plan(debug_train_only=True)
    assert p.placement.num_engines == 0
    assert not any(process.name.startswith("engine") for process in p.processes)


def test_saved_samples_mean_training_alone() -> None:
    assert plan(load_debug_rollout_data="d/{rollout_id}.pt").updates["debug_train_only"]


def test_external_engines_are_counted_by_address() -> None:
    p = plan(rollout_external_engine_addrs=["127.0.0.1:1", "127.0.0.1:2"])
    assert p.updates["rollout_external"]
    assert p.updates["rollout_num_engines"] == 2
    assert p.engine.value == "sglang"


@given(
    tensor=st.sampled_from([1, 2]),
    pipeline=st.sampled_from([1, 2, 4]),
    context=st.sampled_from([1, 2]),
    data=st.integers(1, 3),
)
def test_parallel_sizes_multiply_to_the_ranks(tensor: int, pipeline: int, context: int, data: int) -> None:
    ranks = tensor * pipeline * context * data
    p = plan(
        Machine(cores=4, joins_cluster=True),
        device="cpu",
        actor_num_gpus_per_node=ranks,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        use_dynamic_batch_size=True,
        max_tokens_per_gpu=512,
    )
    assert p.parallel.data == data
    assert p.updates["world_size"] == ranks


# ---- paths and checkpoints ----


def test_a_run_is_named_after_model_algorithm_and_time() -> None:
    p = plan()
    assert p.paths.run_name == "model-grpo-20260101-120000"
    assert p.updates["run_dir"] == "/project/outputs/model-grpo-20260101-120000"


def test_checkpoints_go_to_the_run_when_an_interval_is_given() -> None:
    p = plan(save_interval=5, run_name="try")
    assert p.updates["save"] == "/project/outputs/try/checkpoints"
    assert plan(run_name="try").updates["save"] is None


def test_a_fresh_run_loads_the_model_folder_without_an_optimizer() -> None:
    updates = plan().updates
    assert (updates["load"], updates["start_rollout_id"]) == ("model", 0)
    assert updates["finetune"] and updates["no_load_optim"] and updates["no_load_rng"]
    assert updates["load_is_hf"] and not updates["load_is_megatron"]


def test_a_run_of_the_same_name_resumes_from_its_checkpoint() -> None:
    own = "/project/outputs/try/checkpoints"
    p = plan(checkpoints={own: "megatron"}, run_name="try", save_interval=5, use_kl_loss=True)
    assert (p.updates["load"], p.updates["start_rollout_id"]) == (own, None)
    assert "finetune" not in p.updates
    assert p.updates["ref_load"] == "model", "the reference is what the actor started from at first"


def test_load_and_save_in_one_folder_is_a_first_start_or_a_resume() -> None:
    first = plan(checkpoints={"ckpt": "missing"}, load="ckpt", save="ckpt", ref_load="ref", ref_ckpt_step=7)
    assert (first.updates["load"], first.updates["ckpt_step"]) == ("ref", 7)
    assert "--load ckpt holds no checkpoint yet" in first.start.reason
    again = plan(checkpoints={"ckpt": "megatron"}, load="ckpt", save="ckpt", ref_load="ref")
    assert (again.updates["load"], again.updates["load_is_megatron"]) == ("ckpt", True)


def test_a_kl_term_without_a_reference_takes_what_the_actor_starts_from() -> None:
    assert plan(use_kl_loss=True).updates["ref_load"] == "model"
    assert plan(kl_coef=0.1, checkpoints={"base": "huggingface"}, load="base").updates["ref_load"] == "base"
    assert plan().updates["ref_load"] is None


# ---- other values ----


def test_what_is_not_said_takes_its_neighbours_value() -> None:
    updates = plan(eps_clip=0.3, reward_key="score", rollout_max_context_len=100, max_tokens_per_gpu=512).updates
    assert updates["eps_clip_high"] == 0.3
    assert updates["eval_reward_key"] == "score"
    assert updates["rollout_max_prompt_len"] == 99
    assert updates["eval_max_context_len"] == 100
    assert updates["log_probs_max_tokens_per_gpu"] == 512
    assert updates["over_sampling_batch_size"] == 4
    assert updates["eval_function_path"] == "slime.rollout.sglang_rollout.generate_rollout"


def test_one_sample_a_prompt_has_no_deviation_to_divide_by() -> None:
    p = plan(n_samples_per_prompt=1)
    assert not p.updates["grpo_std_normalization"]
    assert any("--n-samples-per-prompt 1" in note for note in p.notes)


def test_rows_name_their_own_fields() -> None:
    row = {"prompt": "1 + 1", "label": "2"}
    assert plan(first_row=row).updates["input_key"] == "prompt"
    assert plan(first_row=row).updates["label_key"] == "label"
    assert "input_key" not in plan(first_row=row, input_key="question").updates
    assert "input_key" not in plan(first_row={"input": "1 + 1"}).updates


def test_an_interval_without_a_task_is_noted_not_refused() -> None:
    p = plan(eval_interval=5)
    assert p.updates["eval_interval"] is None
    assert any("there is no evaluation" in note for note in p.notes)


def test_engines_that_gave_their_memory_back_need_the_weights_every_rollout() -> None:
    note = "weights go out every rollout: engines that gave their memory back need them"
    assert any(note in text for text in plan(colocate=True, update_weights_interval=2).notes)
    assert not any(note in text for text in plan(update_weights_interval=2).notes)


def test_trainer_memory_that_an_engine_may_not_open_is_noted() -> None:
    machine = Machine(cores=16, num_gpus=2, has_sglang=True, expandable_segments=True)
    shared = {"colocate": True, "actor_num_gpus_per_node": 1}

    def notes(machine: Machine, **values: Any) -> str:
        return " ".join(plan(machine, **values).notes)

    assert "expandable_segments" in notes(machine, **shared)
    assert "expandable_segments" not in notes(dataclasses.replace(machine, expandable_segments=False), **shared)
    assert "expandable_segments" not in notes(
        machine, **shared, update_weight_transport="disk", update_weight_disk_dir="w"
    )
    assert "expandable_segments" not in notes(machine, actor_num_gpus_per_node=1, rollout_num_gpus=1)


@pytest.mark.parametrize(
    ("loop", "function", "ahead", "limit"),
    [
        ("sync", None, 0, None),
        ("sync", FULLY_ASYNC_ROLLOUT, 0, 6),
        ("async", None, 4, 6),
        ("async", FULLY_ASYNC_ROLLOUT, 0, 6),
    ],
)
def test_how_far_generation_runs_ahead_bounds_the_age_of_samples(
    loop: Any, function: Any, ahead: int, limit: Any
) -> None:
    said: dict[str, Any] = {"rollout_function_path": function} if function else {}
    p = plan(loop=loop, async_buffer_size=4, update_weights_interval=2, **said)
    assert (p.updates["rollouts_ahead"], p.updates["max_staleness"]) == (ahead, limit)
    assert p.updates["eval_function_path"] == "slime.rollout.sglang_rollout.generate_rollout"


def test_a_buffer_that_nothing_fills_is_noted() -> None:
    note = "--async-buffer-size 4 has no effect in train.py"
    assert any(note in text for text in plan(async_buffer_size=4).notes)
    assert not any(note in text for text in plan(loop="async", async_buffer_size=4).notes)


def test_what_the_user_said_is_kept_beside_what_was_derived() -> None:
    p = plan(recompute_activations=True, attention_dropout=0.1)
    assert (p.given["recompute_activations"], p.given["attention_dropout"]) == (True, 0.1)
    assert "recompute_granularity" not in p.given


def test_evaluation_of_ones_own_may_go_with_group_rewards() -> None:
    tasks = (EvalDatasetConfig("aime", "a.jsonl"),)
    with pytest.raises(ConfigError, match="--group-rm"):
        plan(group_rm=True, eval_datasets=tasks)
    assert plan(group_rm=True, eval_datasets=tasks, eval_function_path="mine.evaluate").eval_tasks == ("aime",)


def test_advantages_may_come_from_elsewhere() -> None:
    without: dict[str, Any] = {"compute_advantages_and_returns": False}
    with pytest.raises(ConfigError, match="--loss-type sft_loss"):
        plan(**without)
    assert plan(**without, rollout_data_postprocess_path="mine.advantages").algorithm.startswith("grpo")
    assert plan(**without, loss_type="sft_loss").algorithm == "supervised fine-tuning"


def test_tasks_are_written_back_as_pairs() -> None:
    p = plan(eval_interval=5, eval_datasets=(EvalDatasetConfig("aime", "a.jsonl"), EvalDatasetConfig("gsm", "g.jsonl")))
    assert p.updates["eval_prompt_data"] == ["aime", "a.jsonl", "gsm", "g.jsonl"]
    assert p.updates["eval_interval"] == 5


def test_details_are_dumped_per_rollout() -> None:
    updates = plan(dump_details="d").updates
    assert updates["save_debug_rollout_data"] == "d/rollout_data/{rollout_id}.pt"
    assert updates["save_debug_train_data"] == "d/train_data/{rollout_id}.pt"


def test_replayed_experts_of_the_engines_are_replayed() -> None:
    assert plan(use_rollout_routing_replay=True).updates["use_routing_replay"]


def test_a_released_trainer_saves_every_rollout() -> None:
    p = plan(release_train=True, save="s", update_weight_transport="disk", update_weight_disk_dir="w")
    assert p.updates["save_interval"] == 1


def test_the_model_is_read_from_its_config() -> None:
    updates = plan().updates
    assert (updates["num_layers"], updates["qk_layernorm"], updates["rotary_base"]) == (4, True, 1000000.0)
    assert not updates["untie_embeddings_and_output_weights"]
    assert updates["padded_vocab_size"] == 1024
    assert updates["hidden_dropout"] == updates["attention_dropout"] == 0.0


def test_fusions_that_need_a_gpu_are_off_on_the_cpu() -> None:
    p = plan(apply_rope_fusion=True)
    assert p.updates["apply_rope_fusion"] is False
    assert any("for GPUs only" in note for note in p.notes)


@pytest.mark.parametrize(
    ("stages", "more", "number", "fits"),
    [
        (1, {}, 4, True),
        (2, {}, 4, False),
        (2, {"num_virtual_stages_per_pipeline_rank": 2}, 2, False),
        (2, {"num_layers_per_virtual_pipeline_stage": 1}, 1, True),
        (2, {"decoder_first_pipeline_num_layers": 3}, 3, False),
        (2, {"decoder_first_pipeline_num_layers": 3}, 1, True),
    ],
)
def test_blocks_that_are_recomputed_fill_every_stage(
    stages: int, more: dict[str, int], number: int, fits: bool
) -> None:
    """Four layers; Megatron's loop over blocks would leave a stage that is not a multiple of them."""
    words = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": number} | more
    asked = config(actor_num_gpus_per_node=2, pipeline_model_parallel_size=stages, **words)
    if fits:
        assert resolve(asked)
        return
    with pytest.raises(ConfigError, match=f"--recompute-num-layers {number} .* does not divide"):
        resolve(asked)


def test_selective_recomputation_has_a_short_form() -> None:
    assert plan(recompute_activations=True).updates["recompute_granularity"] == "selective"
