"""The Triton kernels equal the plain expressions in float32; without a GPU they run in Triton's interpreter."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined
pytest.importorskip("triton")

from slime.backends.megatron import gpu_head, head, triton_kernels  # noqa: E402
from slime.backends.megatron.head import HeadOptions, VocabShard  # noqa: E402
from slime.backends.megatron.packed import taken_keys  # noqa: E402
from slime.data.packing import pack  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")


def _drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def _gradients_are_equal(ours: Tensor, plain: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    grad = _drawn(*ours.shape, seed=9).detach()
    for mine, theirs in zip(*(torch.autograd.grad(out, inputs, grad) for out in (ours, plain)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(7, 2, 24), (33, 1, 128), (3, 1, 1100)], ids=str)
def test_rms_norm_and_its_gradients(shape: tuple[int, ...]) -> None:
    x, weight = _drawn(*shape), _drawn(shape[-1], seed=1)
    plain = F.rms_norm(x, (shape[-1],), weight, 1e-5)
    _gradients_are_equal(triton_kernels.rms_norm(x, weight, 1e-5), plain, (x, weight))


def test_rms_norm_of_heads_inside_wider_rows() -> None:
    """Keys are a slice of the product that also gives queries and values."""
    whole, weight = _drawn(5, 3, 32), _drawn(8, seed=1)
    keys = whole[..., 16:24]
    _gradients_are_equal(
        triton_kernels.rms_norm(keys, weight, 1e-6), F.rms_norm(keys, (8,), weight, 1e-6), (whole, weight)
    )


@pytest.mark.parametrize("rotated", [8, 4], ids=["whole head", "half of the head"])
def test_rotation_and_its_gradient(rotated: int) -> None:
    x = _drawn(5, 3, 8)
    angles = _drawn(5, 1, rotated // 2, seed=1).detach()
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., : rotated // 2], x[..., rotated // 2 : rotated]
    plain = torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., rotated:]], -1)
    _gradients_are_equal(triton_kernels.rotate(x, cos, sin), plain, (x,))


def test_swiglu_and_its_gradient() -> None:
    x = _drawn(5, 1, 12)
    gate, up = x.chunk(2, -1)
    _gradients_are_equal(triton_kernels.swiglu(x), F.silu(gate) * up, (x,))


def test_a_short_number_is_rounded_once() -> None:
    """As SGLang's kernels do: not after the scale and again after the weight. (The interpreter cuts bfloat16 off.)"""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    x, weight = _drawn(16, 64, dtype=dtype), _drawn(64, seed=1, dtype=dtype)
    exact = F.rms_norm(x.float(), (64,), weight.float(), 1e-6)
    assert torch.equal(triton_kernels.rms_norm(x, weight, 1e-6), exact.to(dtype))


def test_keys_that_are_taken_several_times_get_all_their_gradients() -> None:
    """Two responses (rows 3, and 4 5) share the prompt of rows 0 1 2; row 6 stands alone."""
    tokens = [torch.tensor([1, 2, 3, 4, 9]), torch.tensor([1, 2, 3, 5, 6, 9]), torch.tensor([7, 8])]
    batch = pack(tokens, [2, 3, 1], [0, 0, 1], share_prompts=True)
    taken = taken_keys(batch, torch.device(DEVICE))
    assert taken.index.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 4, 5, 6]
    x = _drawn(7, 2, 5)
    _gradients_are_equal(triton_kernels.take_rows(x, *taken), x[taken.index], (x,))


@pytest.mark.parametrize("kept", [0, 3, 10], ids=["recomputes all", "keeps some", "keeps all"])
@pytest.mark.parametrize("entropy_has_grad", [False, True], ids=["log-probs", "and entropy"])
def test_the_head_equals_the_plain_one(kept: int, entropy_has_grad: bool) -> None:
    """Ten rows in chunks of four, a vocabulary of 9000 (two blocks) of which 8990 count, temperature 0.7."""
    hidden, weight = _drawn(10, 16), _drawn(9000, 16, seed=1)
    targets = torch.arange(10, device=DEVICE) * 899
    shard = VocabShard(0, 8990)
    options = HeadOptions(0.7, True, entropy_has_grad, chunk_rows=4, keep_bytes=kept * 8990 * 4)
    plain_options = HeadOptions(0.7, True, entropy_has_grad)
    ours = gpu_head.response_log_probs(hidden, weight, targets, shard, options)
    plain = head.response_log_probs(hidden, weight, targets, shard, plain_options)
    losses = []
    for log_probs, entropy in (ours, plain):
        assert entropy is not None
        weights = torch.arange(10, device=DEVICE) / 10
        losses.append((log_probs * weights).sum() + ((entropy * weights).sum() if entropy_has_grad else 0.0))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_logits_beyond_the_reach_of_a_short_integer_are_found() -> None:
    """16,384 rows of a vocabulary of 151,936 are more than 2^31 numbers; here four rows that lie 2^30 apart."""
    apart, columns = 1 << 30, 9000
    memory = torch.empty(3 * apart + columns, dtype=torch.bfloat16, device=DEVICE)  # of which few pages are touched
    logits = memory.as_strided((4, columns), (apart, 1))
    logits.copy_(_drawn(4, columns).detach())
    targets = torch.tensor([0, 8999, 8191, 8192], device=DEVICE)
    values = logits.float()
    stats = torch.empty(3, 4, device=DEVICE)
    triton_kernels.logit_stats(logits, targets, stats, 1.0)
    torch.testing.assert_close(stats[0], values.logsumexp(1))
    torch.testing.assert_close(stats[1], values.gather(1, targets[:, None]).squeeze(1))
    grad = torch.arange(1.0, 5.0, device=DEVICE)
    is_here, at_target = torch.ones(4, dtype=torch.bool, device=DEVICE), -grad
    triton_kernels.logits_to_gradients(logits, targets, is_here, stats[0], stats[2], at_target, grad, None, 1.0)
    expected = (-grad[:, None] * values.softmax(1)).scatter(1, targets[:, None], at_target[:, None])
    torch.testing.assert_close(logits.float(), expected, rtol=0.02, atol=1e-6)


def test_the_head_goes_backward_only_once() -> None:
    hidden, weight = _drawn(3, 8), _drawn(20, 8, seed=1)
    options = HeadOptions()
    log_probs, _ = gpu_head.response_log_probs(
        hidden, weight, torch.arange(3, device=DEVICE), VocabShard(0, 20), options
    )
    log_probs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        log_probs.sum().backward()


def test_no_rows_give_no_log_probs_and_a_zero_gradient() -> None:
    hidden, weight = _drawn(0, 8), _drawn(20, 8, seed=1)
    targets = torch.zeros(0, dtype=torch.long, device=DEVICE)
    log_probs, _ = gpu_head.response_log_probs(hidden, weight, targets, VocabShard(0, 20), HeadOptions())
    assert log_probs.shape == (0,)
    gradients = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    assert gradients[0].shape == (0, 8) and not gradients[1].any()
