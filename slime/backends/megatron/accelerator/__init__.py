"""What training asks of the device it runs on, CUDA or CPU: the one place that knows one from the other.

`accelerator_for(device).install()` must run before megatron is imported: on a CPU it gives the names of `torch.cuda`
that Megatron uses their CPU meaning.
"""

from slime.backends.megatron.accelerator.base import Accelerator, MemoryFacts

__all__ = ["Accelerator", "MemoryFacts", "accelerator_for"]


def accelerator_for(device: str, local_index: int = 0) -> Accelerator:
    """The accelerator of this process.

    Args:
        device: `cpu` or `cuda`.
        local_index: which of the node's CUDA devices is ours; no meaning on a CPU.
    """
    if device == "cpu":
        from slime.backends.megatron.accelerator.cpu import CpuAccelerator

        return CpuAccelerator()
    if device == "cuda":
        from slime.backends.megatron.accelerator.cuda import CudaAccelerator

        return CudaAccelerator(local_index)
    raise ValueError(f"Training runs on `cpu` or `cuda`, not on {device!r} (--device).")
