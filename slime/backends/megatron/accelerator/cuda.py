"""CUDA as Megatron expects it: nothing to override."""

import mmap
import os

import torch

from slime.backends.megatron.accelerator.base import MemoryFacts


class CudaAccelerator:
    """One CUDA device of this node."""

    backend = "nccl"

    def __init__(self, local_index: int) -> None:
        self.device = torch.device("cuda", local_index)

    def install(self) -> None:
        torch.cuda.set_device(self.device)

    def make_deterministic(self) -> None:
        """cuBLAS with its own workspaces, NCCL with one algorithm, kernels without atomic sums; what the environment
        says already is kept. cuBLAS and NCCL read it when they start."""
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = (
            False  # nothing reads it; filling costs passes over memory
        )

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        torch.cuda.ipc_collect()  # memory that another process had opened waits for this
        torch.cuda.empty_cache()

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Pages of their own, registered with CUDA: torch's allocator of pinned memory would round each size up to a
        power of two. Forked children get none of them, as the system would copy for them what is pinned."""
        pages = mmap.mmap(-1, num_bytes)
        pages.madvise(mmap.MADV_DONTFORK)
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        result = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0)
        torch.cuda.check_error(int(result))
        return memory

    def memory(self) -> MemoryFacts:
        _, total_bytes = torch.cuda.mem_get_info(self.device)
        return MemoryFacts(
            torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device), total_bytes
        )
