"""What a checkpoint in the background is written from: copies in pinned memory that training does not reach."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def test_copies_are_of_their_moment_and_pinned_memory_is_taken_once() -> None:
    from slime.backends.megatron.accelerator import accelerator_for
    from slime.backends.megatron.staging import Staging

    accelerator = accelerator_for("cuda")
    accelerator.install()
    pinned, take = [], accelerator.pinned
    accelerator.pinned = lambda size: pinned.append(size) or take(size)  # type: ignore[method-assign]
    numbers = torch.randn(4096, 8192, device="cuda")
    tensors = [numbers, numbers.bfloat16(), numbers[:100].T, numbers[0, 0]]
    staging = Staging(accelerator)
    for _ in range(3):
        expected = [tensor.cpu() for tensor in tensors]
        copies, memory = staging.copies(tensors)
        for tensor in tensors[:2]:
            tensor.add_(1)  # as the next step would
        torch.cuda.synchronize()
        for copy, tensor in zip(copies, expected, strict=True):
            assert copy.device.type == "cpu" and copy.is_pinned()
            assert torch.equal(copy, tensor)
        assert memory is not None
        staging.give_back(memory)
    assert len(pinned) == 1
