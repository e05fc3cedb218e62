"""Evaluation: tasks side by side, each with its own sampling, functions and counts."""

import pytest

from slime.rollout.base_types import RolloutFnEvalOutput, call_rollout_fn
from slime.rollout.sglang_rollout import EVAL_PROMPT_DATASET, generate_rollout
from slime.utils.eval_config import build_eval_dataset_configs
from slime.utils.types import Sample
from tests.unit.rollout import plugins

PLUGINS = plugins.__name__


def tasks(args, *configs):
    args.eval_datasets = build_eval_dataset_configs(args, list(configs))
    return args


def test_each_task_reports_rewards_truncation_and_samples_in_file_order(engine, make_args, prompts):
    args = make_args(rollout_max_response_len=4)
    first = prompts("wait:3", ("say:longer", "ok"), name="a.jsonl")
    second = prompts(("say:x", "x"), name="b.jsonl")
    tasks(args, {"name": "a", "path": first, "n_samples_per_eval_prompt": 2}, {"name": "b", "path": second})
    output = call_rollout_fn(generate_rollout, args, 5, None, evaluation=True)
    assert isinstance(output, RolloutFnEvalOutput)
    assert output.data["a"]["rewards"] == [1.0, 1.0, 0.0, 0.0]
    assert [sample.index for sample in output.data["a"]["samples"]] == [0, 1, 2, 3]
    assert [sample.group_index for sample in output.data["a"]["samples"]] == [0, 0, 1, 1]
    assert output.data["b"]["rewards"] == [1.0]
    assert output.data["b"]["truncated"] == [False]


def test_truncated_answers_are_marked(engine, make_args, prompts):
    def cut(reply):
        reply["meta_info"]["finish_reason"] = {"type": "length", "length": 2}
        return reply

    engine.change_reply = cut
    args = tasks(make_args(), {"name": "a", "path": prompts("x")})
    assert generate_rollout(args, 0, None, evaluation=True).data["a"]["truncated"] == [True]


def test_sampling_comes_from_the_task_then_from_the_flags(engine, make_args, prompts):
    args = make_args(eval_temperature=0.0, eval_max_response_len=99, eval_top_p=None)
    tasks(args, {"name": "a", "path": prompts("x"), "max_response_len": 3, "repetition_penalty": 1.5})
    generate_rollout(args, 0, None, evaluation=True)
    assert engine.requests[0]["sampling_params"] == {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_new_tokens": 3,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
        "repetition_penalty": 1.5,
    }


def test_deterministic_answers_have_seeds_of_their_own_that_every_evaluation_repeats(engine, make_args, prompts):
    args = make_args(sglang_enable_deterministic_inference=True)
    tasks(args, {"name": "a", "path": prompts("x", "y"), "n_samples_per_eval_prompt": 2})
    generate_rollout(args, 0, None, evaluation=True)
    seeds = sorted(request["sampling_params"]["sampling_seed"] for request in engine.requests)
    assert len(set(seeds)) == 4
    generate_rollout(args, 1, None, evaluation=True)
    assert sorted(request["sampling_params"]["sampling_seed"] for request in engine.requests[4:]) == seeds


def test_a_task_has_its_own_reward_generate_function_and_metadata(engine, make_args, prompts):
    args = make_args(custom_rm_path=f"{PLUGINS}.fails", eval_reward_key="score")
    task = {
        "name": "a",
        "path": prompts("x"),
        "custom_rm_path": f"{PLUGINS}.as_dict",
        "custom_generate_function_path": f"{PLUGINS}.per_sample",
        "rm_type": "math",
        "metadata_overrides": {"level": 3},
    }
    output = generate_rollout(tasks(args, task), 0, None, evaluation=True)
    assert plugins.calls == [("per sample", True)]
    assert output.data["a"]["rewards"] == [1.0]
    assert output.data["a"]["samples"][0].metadata == {"rm_type": "math", "level": 3}


def test_fan_out_answers_all_count(engine, make_args, prompts):
    args = make_args(custom_rm_path=f"{PLUGINS}.exact_of_all")
    task = {"name": "a", "path": prompts("x"), "custom_generate_function_path": f"{PLUGINS}.fan_out"}
    assert generate_rollout(tasks(args, task), 0, None, evaluation=True).data["a"]["rewards"] == [1.0, 0.0]


def test_a_missing_reward_key_names_the_task(engine, make_args, prompts):
    args = tasks(make_args(eval_reward_key="score"), {"name": "a", "path": prompts("x")})
    with pytest.raises(ValueError, match=r"evaluation 'a' has the reward 1.0.*--eval-reward-key"):
        generate_rollout(args, 0, None, evaluation=True)


def test_an_answer_without_reward_is_an_error(engine, make_args, prompts):
    def aborted(reply):
        reply["meta_info"]["finish_reason"] = {"type": "abort"}
        return reply

    engine.change_reply = aborted
    args = tasks(make_args(), {"name": "a", "path": prompts("x")})
    with pytest.raises(ValueError, match="'a' ended as aborted without a reward"):
        generate_rollout(args, 0, None, evaluation=True)


def test_files_are_read_once_and_samples_are_fresh_each_time(engine, make_args, prompts):
    args = tasks(make_args(), {"name": "a", "path": prompts("x")})
    first = generate_rollout(args, 0, None, evaluation=True).data["a"]["samples"][0]
    second = generate_rollout(args, 1, None, evaluation=True).data["a"]["samples"][0]
    assert len(EVAL_PROMPT_DATASET) <= 1
    assert first is not second
    assert second.response == "ok"
    assert second.status is Sample.Status.COMPLETED
