"""CUDA as Megatron expects it: nothing to override."""

import torch

from slime.backends.megatron.accelerator.base import MemoryFacts


class CudaAccelerator:
    """One CUDA device of this node."""

    backend = "nccl"

    def __init__(self, local_index: int) -> None:
        self.device = torch.device("cuda", local_index)

    def install(self) -> None:
        torch.cuda.set_device(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def memory(self) -> MemoryFacts:
        _, total_bytes = torch.cuda.mem_get_info(self.device)
        return MemoryFacts(
            torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device), total_bytes
        )
