"""Advantages and returns of each estimator, in values that can be checked by hand."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from slime.algorithm.advantages import compute_advantages_and_returns
from slime.data.context_parallel import ContextParallel
from tests.distributed.pool import RankPool


def tensors(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


def rollout(**more):
    """Two samples, of 3 and 1 response tokens, with the rewards 1 and -2; the second token of the first is a tool's."""
    return {
        "rewards": [1.0, -2.0],
        "response_lengths": [3, 1],
        "total_lengths": [5, 3],
        "loss_masks": [torch.tensor([1, 0, 1]), torch.tensor([1])],
        "log_probs": tensors([-1.0, -1.0, -1.0], [-1.0]),
        "ref_log_probs": tensors([-1.5, -1.0, -0.5], [-2.0]),
    } | more


def lists(rows: list[torch.Tensor]) -> list[list[float]]:
    return [row.tolist() for row in rows]


@pytest.mark.parametrize("estimator", ["grpo", "gspo", "cispo"])
def test_group_relative_estimators_give_each_token_the_reward_of_its_sample(make_args, estimator: str) -> None:
    data = rollout()
    compute_advantages_and_returns(make_args(advantage_estimator=estimator), data)
    assert lists(data["advantages"]) == lists(data["returns"]) == [[1.0, 1.0, 1.0], [-2.0]]
    assert lists(data["kl"]) == [[0.0, 0.0, 0.0], [0.0]]


def test_the_baseline_estimator_pays_the_kl_at_each_token(make_args) -> None:
    data = rollout()
    compute_advantages_and_returns(make_args(advantage_estimator="reinforce_plus_plus_baseline", kl_coef=0.1), data)
    assert lists(data["kl"]) == [[0.5, 0.0, -0.5], [1.0]]
    assert data["advantages"][0].tolist() == pytest.approx([0.95, 1.0, 1.05])
    assert data["advantages"][1].tolist() == pytest.approx([-2.1])
    assert lists(data["returns"]) == lists(data["advantages"])


def test_reinforce_plus_plus_discounts_the_reward_from_the_last_trained_token(make_args) -> None:
    """KL penalties 0.05 and 0.05 (k1: 0.5, 0, -0.5, masked in the middle) and reward 1 at the third token, discount
    1/2: 1.05, 0.525, 0.2625 - 0.05."""
    data = rollout()
    compute_advantages_and_returns(make_args(advantage_estimator="reinforce_plus_plus", kl_coef=0.1, gamma=0.5), data)
    assert data["returns"][0].tolist() == pytest.approx([0.2125, 0.525, 1.05])
    assert data["returns"][1].tolist() == pytest.approx([-2.1])


def test_a_tool_token_at_the_end_does_not_get_the_reward(make_args) -> None:
    data = rollout(loss_masks=[torch.tensor([1, 1, 0]), torch.tensor([0])])
    compute_advantages_and_returns(make_args(advantage_estimator="reinforce_plus_plus", gamma=0.5), data)
    assert lists(data["returns"]) == [[0.5, 1.0, 0.0], [0.0]]


def test_ppo_gives_gae_with_the_reward_at_the_last_token(make_args) -> None:
    """gamma 1, lambda 1/2, values 0.5: deltas 0, 0, 1 - 0.5; advantages 0.125, 0.25, 0.5; returns add the values."""
    values = tensors([0.5, 0.5, 0.5], [0.0])
    data = rollout(values=values)
    compute_advantages_and_returns(make_args(advantage_estimator="ppo", lambd=0.5), data)
    assert lists(data["advantages"]) == [[0.125, 0.25, 0.5], [-2.0]]
    assert lists(data["returns"]) == [[0.625, 0.75, 1.0], [-2.0]]
    assert lists(values) == [[0.5, 0.5, 0.5], [0.0]]


def test_ppo_pays_the_kl_and_survives_an_empty_response(make_args) -> None:
    data = rollout(
        values=tensors([0.0, 0.0, 0.0], []),
        response_lengths=[3, 0],
        loss_masks=[torch.ones(3), torch.zeros(0)],
        log_probs=tensors([-1.0, -1.0, -1.0], []),
        ref_log_probs=tensors([-1.5, -1.0, -0.5], []),
    )
    compute_advantages_and_returns(make_args(advantage_estimator="ppo", kl_coef=0.1, lambd=0.0), data)
    assert data["advantages"][0].tolist() == pytest.approx([-0.05, 0.0, 1.05])
    assert data["advantages"][1].shape == (0,)


def test_without_log_probs_the_shapes_come_from_what_there_is(make_args) -> None:
    """An on-policy step computes none beforehand; samples may have neither engine log-probs nor values."""
    for present in ({"rollout_log_probs": tensors([0.0] * 3, [0.0])}, {"values": tensors([0.0] * 3, [0.0])}, {}):
        data = rollout(**present)
        del data["log_probs"]
        compute_advantages_and_returns(make_args(), data)
        assert lists(data["advantages"]) == [[1.0, 1.0, 1.0], [-2.0]]


def test_the_engines_log_probs_stand_for_the_trainers_when_asked(make_args) -> None:
    data = rollout(rollout_log_probs=tensors([-1.5, -1.0, -0.5], [-2.0]))
    compute_advantages_and_returns(
        make_args(advantage_estimator="reinforce_plus_plus_baseline", kl_coef=0.1, use_rollout_logprobs=True), data
    )
    assert lists(data["kl"]) == [[0.0, 0.0, 0.0], [0.0]]


def test_distillation_pays_the_reverse_kl_to_the_teacher(make_args) -> None:
    data = rollout(teacher_log_probs=tensors([-0.5, -1.0, -3.0], [-1.0]))
    compute_advantages_and_returns(make_args(use_opd=True, opd_kl_coef=0.5), data)
    assert lists(data["opd_reverse_kl"]) == [[-0.5, 0.0, 2.0], [0.0]]
    assert lists(data["advantages"]) == [[1.25, 1.0, 0.0], [-2.0]]
    assert lists(data["returns"]) == [[1.0, 1.0, 1.0], [-2.0]]


def test_distillation_waits_for_log_probs(make_args) -> None:
    data = rollout(teacher_log_probs=None)
    del data["log_probs"]
    compute_advantages_and_returns(make_args(use_opd=True), data)
    assert "opd_reverse_kl" not in data


def test_whitening_counts_trained_tokens_only(make_args) -> None:
    """Trained advantages 1, 1, -2: mean 0, unbiased variance 3."""
    data = rollout()
    compute_advantages_and_returns(make_args(normalize_advantages=True), data)
    scale = math.sqrt(3 + 1e-8)
    assert data["advantages"][0].tolist() == pytest.approx([1 / scale] * 3)
    assert data["advantages"][1].tolist() == pytest.approx([-2 / scale])
    assert lists(data["returns"]) == [[1.0, 1.0, 1.0], [-2.0]]


def double(args, data):
    data["advantages"] = [kl + 2 * reward for kl, reward in zip(data["kl"], data["rewards"], strict=True)]
    data["returns"] = data["advantages"]


def forget(args, data):
    data["advantages"] = data["kl"]


def test_a_custom_estimator_sees_the_kl_and_is_still_whitened(make_args, monkeypatch) -> None:
    monkeypatch.setattr("slime.algorithm.advantages.load_function", {"m.double": double, "m.forget": forget}.get)
    data = rollout()
    compute_advantages_and_returns(make_args(custom_advantage_function_path="m.double"), data)
    assert lists(data["advantages"]) == [[2.0, 2.0, 2.0], [-4.0]]
    data = rollout()
    compute_advantages_and_returns(
        make_args(custom_advantage_function_path="m.double", normalize_advantages=True), data
    )
    assert data["advantages"][1].item() == pytest.approx(-4 / math.sqrt(12))
    with pytest.raises(ValueError, match=r"m.forget must set .*it did not set returns"):
        compute_advantages_and_returns(make_args(custom_advantage_function_path="m.forget"), rollout())


@pytest.mark.parametrize(
    ("changes", "missing", "message"),
    [
        ({"kl_coef": 0.1}, "ref_log_probs", r"--kl-coef 0.1 needs the log-probs of the reference"),
        ({"advantage_estimator": "ppo"}, "values", "needs the critic's values"),
        ({"use_opd": True}, "teacher_log_probs", "--use-opd needs teacher_log_probs"),
        ({"advantage_estimator": "magic"}, "values", "Unknown advantage estimator 'magic'; choose one of grpo"),
    ],
)
def test_what_is_missing_is_named(make_args, changes, missing: str, message: str) -> None:
    data = rollout()
    data.pop(missing, None)
    with pytest.raises(ValueError, match=message):
        compute_advantages_and_returns(make_args(**changes), data)


PER_TOKEN = ("log_probs", "ref_log_probs", "values")


def long_rollout() -> dict:
    generator = torch.Generator().manual_seed(0)
    responses, prompts = [7, 1, 12], [3, 4, 1]
    data = {
        "rewards": [1.0, -2.0, 0.5],
        "response_lengths": responses,
        "total_lengths": [p + r for p, r in zip(prompts, responses, strict=True)],
        "loss_masks": [(torch.rand(r, generator=generator) > 0.2).int() for r in responses],
    }
    for mask in data["loss_masks"]:
        mask[0] = 1
    return data | {key: [torch.randn(r, generator=generator) for r in responses] for key in PER_TOKEN}


ESTIMATORS = ("grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo")


def _one_of_two_ranks(rank: int, world_size: int, port: int, folder: str, all_args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    cp = ContextParallel(rank, 2, dist.group.WORLD)
    results = {}
    for estimator in ESTIMATORS:
        data = long_rollout()
        lengths = list(zip(data["total_lengths"], data["response_lengths"], strict=True))
        for key in PER_TOKEN:
            data[key] = [cp.slice_response(v, *length) for v, length in zip(data[key], lengths, strict=True)]
        compute_advantages_and_returns(all_args[estimator], data, process_group=dist.group.WORLD, context_parallel=cp)
        results[estimator] = (data["advantages"], data["returns"])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_context_parallel_ranks_hold_the_slices_of_what_one_computes(
    ranks: RankPool, make_args, tmp_path: Path
) -> None:
    all_args = {
        estimator: make_args(
            advantage_estimator=estimator, kl_coef=0.1, gamma=0.9, lambd=0.8, normalize_advantages=True
        )
        for estimator in ESTIMATORS
    }
    ranks.run(_one_of_two_ranks, 2, str(tmp_path), all_args)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        for estimator in ESTIMATORS:
            data = long_rollout()
            compute_advantages_and_returns(all_args[estimator], data)
            lengths = list(zip(data["total_lengths"], data["response_lengths"], strict=True))
            for got, key in zip(results[estimator], ("advantages", "returns"), strict=True):
                expected = [
                    ContextParallel(rank, 2).slice_response(v, *length)
                    for v, length in zip(data[key], lengths, strict=True)
                ]
                torch.testing.assert_close(got, expected)
