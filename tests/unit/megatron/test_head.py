"""Log-probabilities in chunks are those of the plain softmax over all logits, forward and backward.

The head itself needs no process group, so these tests run in pytest's own process.
"""

import pytest
import torch
from torch import Tensor

from slime.backends.megatron.head import HeadOptions, VocabShard, response_log_probs

ROWS, VOCAB, HIDDEN, PADDING = 37, 101, 16, 3


def _inputs(dtype: torch.dtype, rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB + PADDING, HIDDEN, generator=generator) * 0.3).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (rows,), generator=generator)


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_softmax = torch.log_softmax((hidden @ weight[:VOCAB].t()).float() / temperature, -1)
    return log_softmax.gather(1, targets[:, None]).squeeze(1), -(log_softmax.exp() * log_softmax).sum(1)


def _gradients(
    log_probs: Tensor, entropy: Tensor | None, inputs: tuple[Tensor, ...], seed: int = 1
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    loss = (log_probs * torch.randn(log_probs.shape, generator=generator)).sum()
    if entropy is not None:
        loss = loss + (entropy * torch.randn(entropy.shape, generator=generator)).sum()
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("keep_rows", [0, 10, ROWS], ids=["recomputes all", "keeps some", "keeps all"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_has_grad", [False, True])
def test_chunks_equal_the_full_softmax(keep_rows: int, temperature: float, entropy_has_grad: bool) -> None:
    hidden, weight, targets = _inputs(torch.float32)
    options = HeadOptions(temperature, True, entropy_has_grad, chunk_rows=5, keep_bytes=keep_rows * VOCAB * 4)
    log_probs, entropy = response_log_probs(hidden, weight, targets, VocabShard(0, VOCAB), options)
    expected, expected_entropy = _plain(hidden, weight, targets, temperature)
    torch.testing.assert_close(log_probs, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-6, rtol=1e-6)
    ours = _gradients(log_probs, entropy if entropy_has_grad else None, (hidden, weight))
    theirs = _gradients(expected, expected_entropy if entropy_has_grad else None, (hidden, weight))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-5)
    assert not ours[1][VOCAB:].any(), "rows that pad the vocabulary take no part"


def test_bfloat16_gradients_are_as_near_to_float32_as_the_plain_ones() -> None:
    hidden, weight, targets = _inputs(torch.bfloat16)
    exact_inputs = tuple(x.detach().float().requires_grad_() for x in (hidden, weight))
    exact = _gradients(_plain(*exact_inputs, targets, 1.0)[0], None, exact_inputs)
    plain = _gradients(_plain(hidden, weight, targets, 1.0)[0], None, (hidden, weight))
    log_probs, _ = response_log_probs(hidden, weight, targets, VocabShard(0, VOCAB), HeadOptions())
    ours = _gradients(log_probs, None, (hidden, weight))
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert (mine.float() - truth).norm() < 1.2 * (theirs.float() - truth).norm() + 1e-6


def test_a_nearly_certain_token_keeps_the_digits_of_its_gradient() -> None:
    """p = 1 - 4.5e-5 is 1 in bfloat16; its gradient 1 - p must not be 0."""
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[10.0], [0.0]], dtype=torch.bfloat16)
    log_probs, _ = response_log_probs(hidden, weight, torch.tensor([0]), VocabShard(0, 2), HeadOptions())
    (gradient,) = torch.autograd.grad(log_probs.sum(), hidden)
    assert gradient.item() == pytest.approx(10 * 4.54e-5, rel=0.02)


def test_no_rows_give_no_log_probs_and_a_zero_gradient() -> None:
    hidden, weight, targets = _inputs(torch.float32, rows=0)
    log_probs, entropy = response_log_probs(hidden, weight, targets, VocabShard(0, VOCAB), HeadOptions(1.0, True))
    assert log_probs.shape == (0,)
    assert entropy is not None and entropy.shape == (0,)
    gradients = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    assert gradients[0].shape == (0, HIDDEN)
    assert not gradients[1].any()


def test_a_frozen_weight_gets_no_gradient_and_the_hidden_states_theirs() -> None:
    hidden, weight, targets = _inputs(torch.float32)
    weight.requires_grad_(False)
    log_probs, _ = response_log_probs(hidden, weight, targets, VocabShard(0, VOCAB), HeadOptions())
    (ours,) = _gradients(log_probs, None, (hidden,))
    (theirs,) = _gradients(_plain(hidden, weight, targets, 1.0)[0], None, (hidden,))
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_going_backward_twice_is_refused_instead_of_wrong() -> None:
    hidden, weight, targets = _inputs(torch.float32)
    log_probs, _ = response_log_probs(hidden, weight, targets, VocabShard(0, VOCAB), HeadOptions())
    log_probs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        log_probs.sum().backward()
