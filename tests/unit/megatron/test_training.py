"""One optimizer step is what the formulas say, however the samples were packed."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.distributed import tiny
from tests.distributed.pool import RankError, RankPool

BASE = dict(use_distributed_optimizer=False, clip_grad=0.0)
"""So that the gradient buffers still hold the gradient after a step."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf_model(tmp_path_factory.mktemp("model"), "llama")


def _train(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    return tiny.train(args, rank, world_size, port, rollouts)


def _trained(ranks: RankPool, model: Path, rollouts: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = ranks.run(_train, 1, tiny.training_args(model, **(BASE | changes)), rollouts)[0]
    return result


def _reordered(data: dict[str, Any], order: list[int]) -> dict[str, Any]:
    return {key: [values[i] for i in order] for key, values in data.items()}


ROLLOUT = tiny.rollout(seed=3)
PACKINGS: dict[str, dict[str, Any]] = {
    "one sample a micro-batch": dict(micro_batch_size=1),
    "all in one micro-batch": dict(micro_batch_size=8),
    "dynamic": dict(use_dynamic_batch_size=True, max_tokens_per_gpu=40),
    "dynamic, balanced": dict(use_dynamic_batch_size=True, max_tokens_per_gpu=60, balance_data=True),
    "prompts not shared": dict(micro_batch_size=8, share_group_prompts=False),
    "prompts not shared, dynamic": dict(use_dynamic_batch_size=True, max_tokens_per_gpu=50, share_group_prompts=False),
    "head in chunks": dict(log_probs_chunk_size=3),
}


@pytest.fixture(scope="module", params=["per sample", "per token"])
def reference(request: pytest.FixtureRequest, ranks: RankPool, model: Path) -> tuple[bool, dict[str, Any]]:
    per_token = request.param == "per token"
    return per_token, _trained(ranks, model, [ROLLOUT], calculate_per_token_loss=per_token)


@pytest.mark.parametrize("packing", PACKINGS)
def test_loss_and_gradient_do_not_depend_on_the_packing(
    ranks: RankPool, model: Path, reference: tuple[bool, dict[str, Any]], packing: str
) -> None:
    per_token, expected = reference
    found = _trained(ranks, model, [ROLLOUT], calculate_per_token_loss=per_token, **PACKINGS[packing])
    assert tiny.largest_difference(expected["gradient"], found["gradient"]) < 1e-6
    for name in ("train/loss", "train/entropy_loss", "train/train_rollout_logprob_abs_diff"):
        assert found["metrics"][0][name] == pytest.approx(expected["metrics"][0][name], abs=1e-6), name


RECOMPUTATIONS: dict[str, tuple[float, dict[str, Any]]] = {
    "activations of attention": (2.0, dict(recompute_granularity="selective")),
    "of attention and MLP": (2.0, dict(recompute_granularity="selective", recompute_modules=["core_attn", "mlp"])),
    "each layer": (2.0, dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)),
    "both layers together": (
        2.0, dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2),
    ),
    "one layer of the two": (1.5, dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1)),
}  # fmt: skip
"""How often attention then runs, where it would run once; and the flags."""


def _train_and_count(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    from slime.backends.megatron import cpu_attention

    attend, calls = cpu_attention.attend, []

    def counted(*inputs: Any) -> Tensor:
        calls.append(1)
        return attend(*inputs)

    cpu_attention.attend = counted
    try:
        return tiny.train(args, rank, world_size, port, rollouts) | {"attentions": len(calls)}
    finally:
        cpu_attention.attend = attend


@pytest.fixture(scope="module")
def kept_activations(ranks: RankPool, model: Path) -> dict[str, Any]:
    result: dict[str, Any] = ranks.run(_train_and_count, 1, tiny.training_args(model, **BASE), [ROLLOUT])[0]
    return result


@pytest.mark.parametrize("recomputed", RECOMPUTATIONS)
def test_activations_that_are_computed_again_give_the_same_bits(
    ranks: RankPool, model: Path, kept_activations: dict[str, Any], recomputed: str
) -> None:
    times, flags = RECOMPUTATIONS[recomputed]
    found = ranks.run(_train_and_count, 1, tiny.training_args(model, **BASE, **flags), [ROLLOUT])[0]
    assert found["attentions"] == times * kept_activations["attentions"]
    for name, gradient in kept_activations["gradient"].items():
        assert torch.equal(gradient, found["gradient"][name]), name


def test_the_order_of_the_samples_does_not_matter(
    ranks: RankPool, model: Path, reference: tuple[bool, dict[str, Any]]
) -> None:
    per_token, expected = reference
    shuffled = _reordered(ROLLOUT, [5, 0, 3, 7, 1, 6, 2, 4])
    found = _trained(ranks, model, [shuffled], calculate_per_token_loss=per_token, micro_batch_size=4)
    assert tiny.largest_difference(expected["gradient"], found["gradient"]) < 1e-6


def _plain_gradient(
    folder: Path, data: dict[str, Any], per_token: bool, kl_to: Path | None = None, temperature: float = 1.0
) -> tuple[float, dict[str, Tensor]]:
    """On-policy GRPO in a dozen lines over transformers' full logits, in float64: loss and gradients by HF names."""

    def log_probs(net: Any, i: int) -> Tensor:
        ids = torch.tensor(data["tokens"][i])
        length = data["response_lengths"][i]
        logits = net(ids[None]).logits[0, -length - 1 : -1] / temperature
        return torch.log_softmax(logits, -1).gather(1, ids[-length:, None]).squeeze(1)

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(kl_to, dtype=torch.float64) if kl_to else None
    total = torch.zeros((), dtype=torch.float64)
    for i, length in enumerate(data["response_lengths"]):
        if length == 0:
            continue
        current, mask = log_probs(net, i), torch.tensor(data["loss_masks"][i])
        loss = -torch.exp(current - current.detach()) * data["rewards"][i]
        if reference is not None:
            difference = current - log_probs(reference, i).detach()
            loss = loss + 0.3 * (torch.exp(-difference) - 1 + difference)
        total = total + (loss * mask).sum() / (1 if per_token else max(int(mask.sum()), 1))
    divisor = sum(max(sum(mask), 1) for mask in data["loss_masks"]) if per_token else len(data["tokens"])
    (total / divisor).backward()
    return (total / divisor).item(), {name: p.grad for name, p in net.named_parameters()}


def _as_hf(gradient: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    from slime.models import family_of
    from slime.models.shape import read_config

    family = family_of(read_config(folder))
    shape = family.shape_of(read_config(folder))
    named: dict[str, Tensor] = {}
    for name, tensor in gradient.items():
        hf_names, layout = family.find(name)
        named |= dict(zip(hf_names, layout.split(tensor, shape), strict=True))
    return named


@pytest.mark.parametrize("per_token", [False, True], ids=["per sample", "per token"])
@pytest.mark.parametrize("with_kl", [False, True], ids=["no KL", "KL to a reference"])
def test_a_step_has_the_gradient_of_the_formula(
    ranks: RankPool, model: Path, tmp_path: Path, per_token: bool, with_kl: bool
) -> None:
    other = tiny.save_hf_model(tmp_path, "llama", seed=5)
    changes = dict(use_kl_loss=True, kl_loss_coef=0.3, kl_loss_type="k3", ref_load=str(other)) if with_kl else {}
    data = tiny.rollout(seed=4, response_lengths=[3, 9, 0, 1, 5, 5, 2, 7])
    found = _trained(ranks, model, [data], calculate_per_token_loss=per_token, rollout_temperature=0.8, **changes)
    loss, gradient = _plain_gradient(model, data, per_token, other if with_kl else None, temperature=0.8)
    assert found["metrics"][0]["train/loss"] == pytest.approx(loss, abs=1e-5)
    assert tiny.largest_difference(gradient, _as_hf(found["gradient"], model)) < 2e-6 * _scale(gradient)
    if with_kl:
        assert found["metrics"][0]["train/kl_loss"] > 0.01
    assert found["metrics"][0]["train/ppo_kl"] == 0.0


def _scale(gradient: dict[str, Tensor]) -> float:
    return max(1.0, *(tensor.abs().max().item() for tensor in gradient.values()))


def test_the_reference_is_the_initial_checkpoint_and_stays_it(ranks: RankPool, model: Path) -> None:
    """KL is 0 before the first step and above 0 after it; swapping leaves the policy's weights as they were."""
    kl = dict(use_kl_loss=True, kl_loss_coef=1e-9, kl_loss_type="k3")
    rollouts = [ROLLOUT, ROLLOUT]
    found = _trained(ranks, model, rollouts, **kl)
    first, second = (metrics["train/kl_loss"] for metrics in found["metrics"])
    assert first == pytest.approx(0, abs=1e-10)
    assert second > 1e-4
    without = _trained(ranks, model, rollouts)
    assert tiny.largest_difference(found["weights"], without["weights"]) < 1e-6


def test_the_reference_follows_the_policy_where_asked_to(ranks: RankPool, model: Path) -> None:
    kl = dict(use_kl_loss=True, kl_loss_coef=1e-9, kl_loss_type="k3", ref_update_interval=1)
    found = _trained(ranks, model, [ROLLOUT, ROLLOUT], **kl)
    assert found["metrics"][1]["train/kl_loss"] == pytest.approx(0, abs=1e-10)


def reads_all(args: Namespace, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    assert all(values is not None for values in rollout_data["log_probs"])


def test_several_steps_a_rollout_compare_with_the_policy_before_the_first(ranks: RankPool, model: Path) -> None:
    """The second of two steps is off-policy by the first one: its importance ratios are not 1.

    The first takes its own log-probs for the old ones, which are the same bits: the result is that of a pass over all.
    """
    two = dict(global_batch_size=4, num_steps_per_rollout=2)
    found = _trained(ranks, model, [ROLLOUT], **two)
    metrics = found["metrics"][0]
    assert metrics["train/ppo_kl"] != 0
    assert metrics["train/step"] == 1
    assert metrics["perf/log_probs_time"] > 0
    whole = _trained(ranks, model, [ROLLOUT], **two, rollout_data_postprocess_path=f"{__name__}.reads_all")
    assert "rollout/log_probs" in whole["metrics"][0]
    assert all(torch.equal(found["weights"][name], tensor) for name, tensor in whole["weights"].items())
    assert {name: value for name, value in whole["metrics"][0].items() if name.startswith("train/")} == {
        name: value for name, value in metrics.items() if name.startswith("train/")
    }
    once = _trained(ranks, model, [ROLLOUT])
    assert "perf/log_probs_time" not in once["metrics"][0], "one step needs no pass before it"


def test_samples_without_response_or_trained_token_change_nothing_but_the_divisor(ranks: RankPool, model: Path) -> None:
    lengths = [5, 0, 0, 0, 4, 3, 6, 2]  # the second group has no token at all
    data = tiny.rollout(seed=6, response_lengths=lengths)
    data["loss_masks"][4] = [0] * 4
    data["rollout_mask_sums"][4] = 0
    for micro_batch_size in (1, 2):
        found = _trained(ranks, model, [data], micro_batch_size=micro_batch_size)
        _, gradient = _plain_gradient(model, data, per_token=False)
        assert tiny.largest_difference(gradient, _as_hf(found["gradient"], model)) < 1e-6


def test_a_rollout_without_any_trained_token_moves_nothing_by_gradient(ranks: RankPool, model: Path) -> None:
    data = tiny.rollout(seed=6)
    data["loss_masks"] = [[0] * n for n in data["response_lengths"]]
    data["rollout_mask_sums"] = [0] * 8
    for per_token in (False, True):
        found = _trained(ranks, model, [data], calculate_per_token_loss=per_token)
        assert found["metrics"][0]["train/grad_norm"] == 0
        assert found["metrics"][0]["train/loss"] == 0


def test_a_gradient_that_is_not_finite_stops_before_the_weights(ranks: RankPool, model: Path) -> None:
    data = tiny.rollout(seed=6)
    data["rewards"][2] = float("nan")
    with pytest.raises(RankError, match=r"FloatingPointError: Rollout 0, step 0: the gradient norm is nan"):
        _trained(ranks, model, [data])
    found = _trained(ranks, model, [data, ROLLOUT], check_for_nan_in_loss_and_grad=False)
    alone = _trained(ranks, model, [ROLLOUT])
    assert tiny.largest_difference(found["weights"], alone["weights"]) < 1e-7, "the bad step left no trace"
