"""The loss of a micro-batch under every flag, by hand and against a token-by-token reference."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from slime.algorithm.corrections import icepop_function, vanilla_tis_function
from slime.algorithm.loss import get_loss_function, policy_loss, sft_loss, value_loss
from slime.data.context_parallel import ContextParallel
from slime.losses.aggregation import sum_of_sample_mean
from tests.distributed.pool import RankPool


def log(*ratios: float) -> torch.Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log()


def two_samples(**more):
    """Samples of 2 and 1 tokens; ratios to the old policy are 2, 1 and 0.5; advantages 1 and -1."""
    batch = {
        "total_lengths": [4, 3],
        "response_lengths": [2, 1],
        "loss_masks": [torch.ones(2), torch.ones(1)],
        "rollout_mask_sums": torch.tensor([2.0, 1.0]),
        "advantages": [torch.ones(2), -torch.ones(1)],
        "log_probs": [log(0.1, 0.2), log(0.4)],
    } | more
    current = log(0.2, 0.2, 0.2).requires_grad_()
    return batch, current


def reducer(batch):
    return sum_of_sample_mean(batch["loss_masks"], batch["rollout_mask_sums"])


def run(args, batch, current, entropy=None):
    loss, metrics = policy_loss(args, batch, current, entropy, reducer(batch))
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    return loss, {name: value.item() for name, value in metrics.items()}


def test_grpo_by_hand(make_args) -> None:
    """Clipped at 1.2 and 1: -(1.2 + 1) / 2; the bad action's ratio 0.5 is clipped to 0.8: +0.8."""
    batch, current = two_samples()
    loss, metrics = run(make_args(), batch, current, torch.tensor([0.5, 1.5, 3.0]))
    assert list(metrics) == ["loss", "pg_loss", "entropy_loss", "pg_clipfrac", "ppo_kl"]
    assert loss.item() == metrics["loss"] == metrics["pg_loss"] == pytest.approx(-1.1 + 0.8)
    assert metrics["entropy_loss"] == pytest.approx(1.0 + 3.0)
    assert metrics["pg_clipfrac"] == pytest.approx(0.5 + 1.0)
    assert metrics["ppo_kl"] == pytest.approx(-math.log(2) / 2 + math.log(2))
    loss.backward()
    assert current.grad.tolist() == pytest.approx([0.0, -0.5, 0.0])


def test_the_first_step_without_old_log_probs_is_exactly_on_policy(make_args) -> None:
    batch, current = two_samples(log_probs=None)
    loss, metrics = run(make_args(), batch, current)
    assert metrics["ppo_kl"] == 0.0
    assert metrics["pg_clipfrac"] == 0.0
    assert "entropy_loss" not in metrics
    loss.backward()
    assert current.grad.tolist() == pytest.approx([-0.5, -0.5, 1.0])


def test_entropy_is_a_bonus(make_args) -> None:
    batch, current = two_samples()
    entropy = torch.tensor([1.0, 1.0, 2.0], requires_grad=True)
    loss, metrics = run(make_args(entropy_coef=0.1), batch, current, entropy)
    assert loss.item() == pytest.approx(metrics["pg_loss"] - 0.1 * 3.0)
    loss.backward()
    assert entropy.grad.tolist() == pytest.approx([-0.05, -0.05, -0.1])
    with pytest.raises(ValueError, match=r"--entropy-coef 0.1 needs the entropy"):
        run(make_args(entropy_coef=0.1), *two_samples())


@pytest.mark.parametrize("kl_loss_type", ["k1", "k2", "k3", "low_var_kl"])
def test_kl_to_the_reference_enters_the_loss(make_args, kl_loss_type: str) -> None:
    batch, current = two_samples(ref_log_probs=[log(0.1, 0.2), log(0.2)])
    args = make_args(use_kl_loss=True, kl_loss_coef=0.5, kl_loss_type=kl_loss_type)
    loss, metrics = run(args, batch, current)
    first = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2}.get(kl_loss_type, math.log(2) - 0.5)
    assert metrics["kl_loss"] == pytest.approx(first / 2)
    assert loss.item() == pytest.approx(metrics["pg_loss"] + 0.5 * metrics["kl_loss"])
    with pytest.raises(ValueError, match="--use-kl-loss needs the log-probs of the reference"):
        run(args, *two_samples())


def test_the_unbiased_kl_weighs_with_the_ratio_and_its_gradient(make_args) -> None:
    batch, current = two_samples(ref_log_probs=[log(0.1, 0.2), log(0.1)], advantages=[torch.zeros(2), torch.zeros(1)])
    loss, metrics = run(make_args(use_kl_loss=True, kl_loss_coef=1.0, use_unbiased_kl=True), batch, current)
    d = math.log(2)
    assert metrics["kl_loss"] == pytest.approx(2 * d / 2 + 0.5 * d)
    loss.backward()  # d(ratio d)/d logp = ratio (d + 1)
    assert current.grad.tolist() == pytest.approx([2 * (d + 1) / 2, 1 / 2, 0.5 * (d + 1)])


def test_clip_bounds_come_from_their_flags(make_args) -> None:
    batch, current = two_samples()
    _, metrics = run(make_args(eps_clip=0.4, eps_clip_high=0.5), batch, current)
    assert metrics["pg_loss"] == pytest.approx(-(1.5 + 1) / 2 + 0.6)
    _, metrics = run(make_args(eps_clip=0.3, eps_clip_high=None), batch, current)
    assert metrics["pg_loss"] == pytest.approx(-(1.3 + 1) / 2 + 0.7)
    batch, current = two_samples(log_probs=[log(0.1, 0.2), log(0.02)])
    _, metrics = run(make_args(eps_clip_c=3.0), batch, current)
    assert metrics["pg_loss"] == pytest.approx(-1.1 + 3.0)


def test_cispo_by_hand(make_args) -> None:
    batch, current = two_samples()
    loss, metrics = run(make_args(advantage_estimator="cispo"), batch, current)
    p = math.log(0.2)
    assert metrics["pg_loss"] == pytest.approx(-(1.2 * p + p) / 2 + 0.8 * p)
    assert metrics["pg_clipfrac"] == pytest.approx(0.5 + 1)
    loss.backward()
    assert current.grad.tolist() == pytest.approx([-0.6, -0.5, 0.8])


def test_gspo_by_hand(make_args) -> None:
    """The first sample's ratio is sqrt(2), for both tokens, clipped at 1.2; the second's 0.5."""
    batch, current = two_samples()
    _, metrics = run(make_args(advantage_estimator="gspo"), batch, current)
    assert metrics["pg_loss"] == pytest.approx(-1.2 + 0.8)
    assert metrics["ppo_kl"] == pytest.approx(-math.log(2) / 2 + math.log(2))
    loss, metrics = run(make_args(advantage_estimator="gspo", eps_clip=1.0, eps_clip_high=1.0), batch, current)
    assert metrics["pg_loss"] == pytest.approx(-math.sqrt(2) + 0.5)
    loss.backward()
    assert current.grad.tolist() == pytest.approx([-math.sqrt(2) / 2, -math.sqrt(2) / 2, 0.5])


def test_opsm_leaves_out_the_bad_sample_that_became_unlikely(make_args) -> None:
    batch, current = two_samples()
    _, metrics = run(make_args(use_opsm=True, opsm_delta=0.6), batch, current)
    assert metrics["pg_loss"] == pytest.approx(-1.1)
    assert metrics["opsm_clipfrac"] == pytest.approx(1.0)
    _, metrics = run(make_args(use_opsm=True, opsm_delta=0.8), batch, current)
    assert metrics["pg_loss"] == pytest.approx(-1.1 + 0.8)
    assert metrics["opsm_clipfrac"] == 0.0


# --- the engine's log-probs ---


def test_the_distance_between_trainer_and_engine_is_reported(make_args) -> None:
    batch, current = two_samples(rollout_log_probs=[log(0.1, 0.1), log(0.4)])
    _, metrics = run(make_args(), batch, current)
    assert metrics["train_rollout_logprob_abs_diff"] == pytest.approx(math.log(2) / 2)
    _, metrics = run(make_args(use_rollout_logprobs=True), batch, current)  # ratios 2, 2, 0.5 to the engine
    assert metrics["train_rollout_logprob_abs_diff"] == pytest.approx(math.log(2) + math.log(2))
    assert metrics["pg_loss"] == pytest.approx(-1.2 + 0.8)
    with pytest.raises(ValueError, match="--use-rollout-logprobs needs rollout_log_probs"):
        run(make_args(use_rollout_logprobs=True), *two_samples())


def test_truncated_importance_sampling_weighs_each_token(make_args) -> None:
    """Ratios trainer/engine 0.5, 1, 4, truncated at 2: -(1.2 * 0.5 + 1) / 2 + 0.8 * 2."""
    batch, current = two_samples(rollout_log_probs=[log(0.2, 0.2), log(0.1)])
    _, metrics = run(make_args(use_tis=True), batch, current)
    assert metrics["pg_loss"] == pytest.approx(-0.8 + 1.6)
    assert metrics["tis"] == pytest.approx(0.75 + 4)
    assert metrics["tis_clipfrac"] == pytest.approx(1.0)
    assert metrics["tis_abs"] == pytest.approx(0.25 + 3)
    assert metrics["ois"] == pytest.approx(1.5 + 0.5)
    with pytest.raises(ValueError, match="this batch has none"):
        run(make_args(use_tis=True), *two_samples())


def test_on_policy_correction_uses_the_current_log_probs(make_args) -> None:
    batch, current = two_samples(log_probs=None, rollout_log_probs=[log(0.1, 0.2), log(0.2)])
    loss, metrics = run(make_args(use_tis=True), batch, current)
    assert metrics["pg_loss"] == pytest.approx(-1.5 + 1)
    loss.backward()
    assert current.grad.tolist() == pytest.approx([-1.0, -0.5, 1.0])


def test_icepop_is_a_plug_in_that_drops_tokens(make_args, monkeypatch) -> None:
    monkeypatch.setattr("slime.algorithm.corrections.load_function", lambda path: icepop_function)
    batch, current = two_samples(rollout_log_probs=[log(0.2, 0.2), log(0.1)])
    _, metrics = run(make_args(use_tis=True, custom_tis_function_path="m.icepop"), batch, current)
    assert metrics["pg_loss"] == pytest.approx(-0.8)
    assert metrics["tis_clipfrac"] == pytest.approx(1.0)


def reject_first(
    args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths, **kw
):
    """Takes the first token of each sample out of the loss, and reports where."""
    assert [len(t) for t in train_log_probs] == [len(t) for t in rollout_log_probs] == response_lengths
    masks = [mask.clone() for mask in loss_masks]
    for mask in masks:
        mask[0] = 0
    rejected = torch.cat([original - mask for original, mask in zip(loss_masks, masks, strict=True)])
    return pg_loss, masks, {"rejected": rejected}


def test_a_rejected_token_still_counts_in_the_denominator_and_in_the_metrics(make_args, monkeypatch) -> None:
    """Left is the second token, ratio 1, of a sample of two: -1/2. The metric sees all tokens."""
    monkeypatch.setattr("slime.algorithm.corrections.load_function", lambda path: reject_first)
    args = make_args(get_mismatch_metrics=True, custom_tis_function_path="m.reject")
    for sums in (torch.tensor([2.0, 1.0]), None):
        batch, current = two_samples(rollout_log_probs=[log(0.2, 0.2), log(0.1)])
        own = reducer(batch)
        batch["rollout_mask_sums"] = sums
        loss, metrics = policy_loss(args, batch, current, None, own)
        assert loss.item() == pytest.approx(-0.5)
        assert metrics["rejected"].item() == pytest.approx(0.5 + 1.0)
        assert metrics["pg_clipfrac"].item() == 0.0


def summed_over_tokens(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    assert (total_lengths, response_lengths, calculate_per_token_loss) == ([4, 3], [2, 1], False)
    return lambda flat: (flat * torch.cat(loss_masks)).sum() * 10


def test_a_custom_reducer_takes_the_policy_loss_only(make_args, monkeypatch) -> None:
    monkeypatch.setattr("slime.algorithm.loss.load_function", lambda path: summed_over_tokens)
    batch, current = two_samples()
    _, metrics = run(make_args(custom_pg_loss_reducer_function_path="m.sum"), batch, current)
    assert metrics["pg_loss"] == pytest.approx(10 * (-1.2 - 1 + 0.8))
    assert metrics["pg_clipfrac"] == pytest.approx(0.5 + 1)


def test_distillation_is_reported_where_the_batch_carries_it(make_args) -> None:
    batch, current = two_samples(opd_reverse_kl=[torch.tensor([1.0, 3.0]), torch.tensor([5.0])])
    assert run(make_args(), batch, current)[1]["opd_reverse_kl"] == pytest.approx(2 + 5)


# --- other losses ---


def test_the_value_loss_by_hand(make_args) -> None:
    """Errors (0.8)^2 clipped, (0.9)^2, and 0."""
    batch, _ = two_samples(values=[torch.zeros(2), torch.ones(1)], returns=[torch.ones(2), torch.ones(1)])
    values = torch.tensor([0.5, 0.1, 1.0], requires_grad=True)
    loss, metrics = value_loss(make_args(), batch, values, reducer(batch))
    assert loss.item() == pytest.approx((0.64 + 0.81) / 2)
    assert list(metrics) == ["value_loss", "value_clipfrac"]
    assert metrics["value_clipfrac"].item() == pytest.approx(0.5)


def test_the_sft_loss_is_the_negative_log_likelihood(make_args) -> None:
    batch, current = two_samples()
    loss, metrics = sft_loss(make_args(), batch, current, None, reducer(batch))
    assert loss.item() == metrics["loss"].item() == pytest.approx(-2 * math.log(0.2))
    assert list(metrics) == ["loss"]


def test_the_loss_is_chosen_by_its_flag(make_args, monkeypatch) -> None:
    for name, function in {"policy_loss": policy_loss, "value_loss": value_loss, "sft_loss": sft_loss}.items():
        assert get_loss_function(make_args(loss_type=name)) is function
    monkeypatch.setattr("slime.algorithm.loss.load_function", {"m.mine": reject_first}.get)
    assert get_loss_function(make_args(loss_type="custom_loss", custom_loss_function_path="m.mine")) is reject_first
    with pytest.raises(ValueError, match="needs --custom-loss-function-path"):
        get_loss_function(make_args(loss_type="custom_loss"))
    with pytest.raises(ValueError, match="Unknown loss type 'magic'"):
        get_loss_function(make_args(loss_type="magic"))


# --- the whole against a reference, and independence of the layout ---


def random_batch(num_samples: int = 5):
    generator = torch.Generator().manual_seed(3)

    def rows() -> list[torch.Tensor]:
        return [torch.randn(r, generator=generator, dtype=torch.float64) * 0.5 - 1 for r in responses]

    responses = [4, 0, 1, 6, 3][:num_samples]
    masks = [(torch.rand(r, generator=generator) > 0.25).int() for r in responses]
    batch = {
        "response_lengths": responses,
        "total_lengths": [r + 2 for r in responses],
        "loss_masks": masks,
        "rollout_mask_sums": torch.tensor([max(m.sum().item(), 1) for m in masks]),
        "advantages": [row + 1 for row in rows()],
        "log_probs": rows(),
        "ref_log_probs": rows(),
        "rollout_log_probs": rows(),
    }
    return batch, rows()


def reference_loss(args, batch, current) -> float:
    """Every formula again, in plain Python."""
    total = 0.0
    for i, new in enumerate(current):
        mask = batch["loss_masks"][i].tolist()
        trained = [t for t in range(len(new)) if mask[t]]
        new_, old, ref, rollout = (
            x.tolist() for x in (new, *(batch[k][i] for k in ("log_probs", "ref_log_probs", "rollout_log_probs")))
        )
        mean_gap = sum(old[t] - new_[t] for t in trained) / max(len(trained), 1)
        for t in trained:
            a = batch["advantages"][i][t].item()
            ratio = math.exp(-mean_gap if args.advantage_estimator == "gspo" else new_[t] - old[t])
            clipped = min(max(ratio, 1 - args.eps_clip), 1 + args.eps_clip_high)
            loss = -clipped * a * new_[t] if args.advantage_estimator == "cispo" else max(-ratio * a, -clipped * a)
            if args.use_opsm and a < 0 and mean_gap > args.opsm_delta:
                loss = 0.0
            if args.use_tis:
                loss *= min(max(math.exp(old[t] - rollout[t]), args.tis_clip_low), args.tis_clip)
            gap = new_[t] - ref[t]
            loss += args.kl_loss_coef * (math.exp(-gap) - 1 + gap)
            total += loss / len(trained)
    return total


FLAGS = [
    dict(advantage_estimator="grpo"),
    dict(advantage_estimator="grpo", use_tis=True, use_opsm=True, opsm_delta=0.05),
    dict(advantage_estimator="gspo", use_tis=True),
    dict(advantage_estimator="cispo", use_opsm=True, opsm_delta=0.05),
]


@pytest.mark.parametrize("flags", FLAGS)
def test_the_whole_loss_equals_a_token_by_token_reference(make_args, flags) -> None:
    args = make_args(use_kl_loss=True, kl_loss_coef=0.3, kl_loss_type="k3", eps_clip_high=0.28, **flags)
    batch, current = random_batch()
    loss, _ = run(args, batch, torch.cat(current))
    assert loss.item() == pytest.approx(reference_loss(args, batch, current), rel=1e-12)


@pytest.mark.parametrize("flags", FLAGS)
def test_loss_and_gradient_do_not_depend_on_micro_batches_or_order(make_args, flags) -> None:
    args = make_args(use_kl_loss=True, kl_loss_coef=0.3, kl_loss_type="k3", **flags)
    results = []
    for layout in ([[0, 1, 2, 3, 4]], [[4, 2], [1], [3, 0]]):
        batch, rows = random_batch()
        current = [row.requires_grad_() for row in rows]
        total, sums = 0.0, {}
        for members in layout:
            part = {k: v[members] if isinstance(v, torch.Tensor) else [v[i] for i in members] for k, v in batch.items()}
            loss, metrics = policy_loss(args, part, torch.cat([current[i] for i in members]), None, reducer(part))
            total += loss
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in metrics.items()}
        total.backward()
        results.append((sums, [row.grad for row in current]))
    assert results[0][0] == pytest.approx(results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def _one_of_two_ranks(rank: int, world_size: int, port: int, folder: str, all_args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    cp = ContextParallel(rank, 2, dist.group.WORLD)
    results = []
    for args in all_args:
        batch, rows = random_batch()
        lengths = list(zip(batch["total_lengths"], batch["response_lengths"], strict=True))
        for key in ("advantages", "log_probs", "ref_log_probs", "rollout_log_probs"):
            batch[key] = [cp.slice_response(row, *length) for row, length in zip(batch[key], lengths, strict=True)]
        rows = [row.requires_grad_() for row in rows]
        current = torch.cat([cp.slice_response(row, *length) for row, length in zip(rows, lengths, strict=True)])
        reduce = cp.get_sum_of_sample_mean(
            batch["total_lengths"], batch["response_lengths"], batch["loss_masks"], batch["rollout_mask_sums"]
        )
        loss, metrics = policy_loss(args, batch, current, None, reduce, context_parallel=cp)
        loss.backward()
        results.append(({k: v.item() for k, v in metrics.items()}, [row.grad for row in rows]))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_context_parallel_ranks_add_up_to_one(ranks: RankPool, make_args, tmp_path: Path) -> None:
    all_args = [make_args(use_kl_loss=True, kl_loss_coef=0.3, **flags) for flags in FLAGS]
    ranks.run(_one_of_two_ranks, 2, str(tmp_path), all_args)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for i, args in enumerate(all_args):
        batch, rows = random_batch()
        rows = [row.requires_grad_() for row in rows]
        loss, metrics = run(args, batch, torch.cat(rows))
        loss.backward()
        assert {k: parts[0][i][0][k] + parts[1][i][0][k] for k in metrics} == pytest.approx(metrics)
        for row, first, second in zip(rows, parts[0][i][1], parts[1][i][1], strict=True):
            torch.testing.assert_close(first + second, row.grad)


def test_a_batch_without_response_tokens_has_a_loss_of_zero(make_args) -> None:
    batch = dict(total_lengths=[2], response_lengths=[0], rollout_mask_sums=torch.zeros(1))
    batch |= {key: [torch.zeros(0)] for key in ("loss_masks", "advantages", "log_probs", "rollout_log_probs")}
    hidden = torch.zeros(0, requires_grad=True)
    for flags in FLAGS:
        loss, metrics = run(make_args(**flags), batch, hidden * 1.0)
        assert loss.item() == 0.0
        assert set(metrics.values()) == {0.0}
        loss.backward()


def test_corrections_ignore_what_else_they_are_given(make_args) -> None:
    """A later release may pass more: `**kwargs` keeps plug-ins written like these alive."""
    parts = dict(train_log_probs=[log(1)], rollout_log_probs=[log(2)], loss_masks=[torch.ones(1)])
    for function in (vanilla_tis_function, icepop_function):
        loss, masks, _ = function(make_args(), pg_loss=torch.ones(1), **parts, something_new=1)
        assert loss.item() == pytest.approx(0.5)
        assert masks is parts["loss_masks"]
