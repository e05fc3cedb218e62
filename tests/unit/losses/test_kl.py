"""KL estimators by hand, and their expectation against the exact divergence."""

import math

import pytest
import torch

from slime.losses.kl import compute_approx_kl


@pytest.mark.parametrize(
    ("kl_loss_type", "expected"),
    [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", math.log(2) - 0.5), ("low_var_kl", math.log(2) - 0.5)],
)
def test_a_token_twice_as_likely_as_in_the_reference(kl_loss_type: str, expected: float) -> None:
    kl = compute_approx_kl(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)]), kl_loss_type)
    assert kl.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kl_loss_type", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kl_loss_type: str) -> None:
    """Weighted with p, the estimates of all tokens add up to the exact divergence."""
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    exact = math.fsum(pi * math.log(pi / qi) for pi, qi in zip(p.tolist(), q.tolist(), strict=True))
    assert (p * compute_approx_kl(p.log(), q.log(), kl_loss_type)).sum().item() == pytest.approx(exact)


def test_the_importance_ratio_makes_tokens_of_another_policy_unbiased() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    sampled_from = torch.tensor([0.2, 0.2, 0.6]).double()
    estimate = compute_approx_kl(p.log(), q.log(), "k3", importance_ratio=p / sampled_from)
    torch.testing.assert_close((sampled_from * estimate).sum(), (p * (p / q).log()).sum())


def test_k2_has_the_gradient_of_the_divergence() -> None:
    """E_p[d * grad log p] is the gradient of KL(p || q); k2's gradient is exactly that product."""
    logits = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.3, 0.3, 0.4]).double()
    log_p = logits.log_softmax(0)
    (log_p.exp().detach() * compute_approx_kl(log_p, q.log(), "k2")).sum().backward()
    estimated = logits.grad
    log_p = (again := logits.detach().clone().requires_grad_()).log_softmax(0)
    (log_p.exp() * (log_p - q.log())).sum().backward()
    torch.testing.assert_close(estimated, again.grad)


def test_low_var_kl_is_clamped_after_the_importance_ratio() -> None:
    far = torch.tensor([0.0]), torch.tensor([5.0])
    assert compute_approx_kl(*far, "k3").item() == pytest.approx(math.exp(5) - 6, rel=1e-6)
    assert compute_approx_kl(*far, "low_var_kl").item() == 10.0
    assert compute_approx_kl(*far, "low_var_kl", torch.tensor([0.01])).item() == pytest.approx(
        0.01 * (math.exp(5) - 6), rel=1e-6
    )


def test_half_precision_log_probs_are_computed_in_float32() -> None:
    kl = compute_approx_kl(torch.tensor([-1.0]).bfloat16(), torch.tensor([-1.5]).bfloat16(), "k1")
    assert kl.dtype == torch.float32
    assert kl.item() == 0.5


def test_an_unknown_estimator_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'k4': choose one of k1, k2, k3, low_var_kl"):
        compute_approx_kl(torch.zeros(1), torch.zeros(1), "k4")
