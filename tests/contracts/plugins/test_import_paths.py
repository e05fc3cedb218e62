"""Names that users' plug-ins and scripts import, under the very paths that they use."""

import importlib
import subprocess
import sys

import pytest

NAMES = {
    "slime.utils.types": "Sample ParamInfo RolloutBatch MultimodalType MultimodalTypes",
    "slime.utils.http_utils": (
        "post get init_http_client get_rollout_num_engines is_port_available find_available_port get_host_info "
        "_wrap_ipv6 terminate_process _http_client"
    ),
    "slime.utils.misc": (
        "load_function SingletonMeta exec_command get_current_node_ip get_free_port should_run_periodic_action Box "
        "group_by chunk_named_params_by_size decode_int32_meta_array"
    ),
    "slime.utils.async_utils": "run get_async_loop",
    "slime.utils.data": "Dataset filter_long_prompt read_file _parse_generalized_path get_source",
    "slime.utils.eval_config": "EvalDatasetConfig build_eval_dataset_configs ensure_dataset_list",
    "slime.utils.mask_utils": "MultiTurnLossMaskGenerator get_response_lengths",
    "slime.utils.memory_utils": "print_memory clear_memory",
    "slime.utils.processing_utils": (
        "load_tokenizer load_processor build_processor_kwargs process_vision_info encode_image_for_rollout_engine "
        "DEFAULT_PATCH_SIZE"
    ),
    "slime.rollout.base_types": "RolloutFnTrainOutput RolloutFnEvalOutput call_rollout_fn",
    "slime.rollout.data_source": "DataSource RolloutDataSource RolloutDataSourceWithBuffer pop_first",
    "slime.rollout.filter_hub.base_types": (
        "DynamicFilterOutput call_dynamic_filter should_drop_dynamic_filter_output MetricGatherer"
    ),
    "slime.rollout.filter_hub.dynamic_sampling_filters": (
        "check_reward_nonzero_std check_reward_nonzero_std_with_fallback"
    ),
    "slime.rollout.sample_hooks": "apply_rollout_sample_hooks set_current_rollout_id",
    "slime.rollout.sft_rollout": "generate_rollout",
    "slime.rollout.sglang_rollout": (
        "GenerateState generate generate_and_rm generate_and_rm_group abort generate_rollout_async eval_rollout "
        "eval_rollout_single_dataset generate_rollout get_model_url _prepare_prompt_ids EVAL_PROMPT_DATASET "
        "load_function"
    ),
    "slime.rollout.sglang_streaming_rollout": "generate_streaming",
    "slime.rollout.sleep_rollout": "sleep",
    "slime.rollout.rm_hub": (
        "async_rm batched_async_rm remote_rm grade_answer_verl get_deepscaler_rule_based_reward compute_score_dapo "
        "f1_score compute_gpqa_reward extract_boxed_answer"
    ),
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_plugins_import_them(module):
    found = importlib.import_module(module)
    missing = [name for name in NAMES[module].split() if not hasattr(found, name)]
    assert missing == []


def test_rollout_and_utils_import_neither_ray_nor_engine_nor_trainer():
    code = (
        f"import importlib, sys\n[importlib.import_module(name) for name in {list(NAMES)}]\n"
        "print(sorted({'ray', 'sglang', 'sglang_router', 'megatron'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_sample_needs_no_torch():
    code = (
        "import sys\nfrom slime.utils.types import Sample\ns = Sample(prompt='p')\n"
        "meta = {'finish_reason': {'type': 'stop'}}\n"
        "s.append_response_tokens(tokens=[1], log_probs=[-1.0], text='x', meta_info=meta)\n"
        "s = Sample.from_dict(s.to_dict())\nprint('torch' in sys.modules, s.response)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False x"
