"""The two ends of a weight sync: where weights come from and where they go.

A transport gets both by injection and knows neither Megatron nor SGLang.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Bucket = list[tuple[str, "Tensor"]]
"""(HuggingFace name, whole contiguous tensor in the served dtype) pairs that travel together."""


class EngineError(RuntimeError):
    """An engine refused a call, gave a wrong answer, or did not answer in time; the message names the engine."""


class WeightSyncError(RuntimeError):
    """Some engine does not hold the weights that the trainer sent; nothing may be generated."""


class WeightSource(Protocol):
    """The trainer's weights, under HuggingFace names."""

    def names(self) -> list[str]:
        """Every tensor's name, in the order in which `buckets` gives them."""

    def buckets(self, size_bytes: int) -> Iterator[Bucket]:
        """Give all weights in buckets of at most `size_bytes` (one larger tensor travels alone).

        Collective: every trainer rank iterates to the end. Ranks other than 0 get empty buckets.
        """


class WeightEngine(Protocol):
    """What a transport and the proof ask of one engine."""

    name: str
    url: str

    def pause(self, mode: str = "abort") -> None:
        """Stop generating. `abort` ends requests in flight, `retract` queues them again, `in_place` freezes them."""

    def resume(self) -> None:
        """Generate again."""

    def flush_cache(self, *, only_if_idle: bool = False) -> None:
        """Forget keys and values that older weights computed; with `only_if_idle` not while there are requests."""

    def update_weights_from_disk(self, path: str, version: str) -> None: ...

    def update_weights_from_shared_memory(self, manifest: dict[str, Any]) -> None: ...

    def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
    ) -> None: ...

    def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        weight_version: str | None = None,
    ) -> None: ...

    def destroy_weights_update_group(self, group_name: str) -> None: ...

    def checksums(self) -> dict[str, str]:
        """Tensor name -> digest of the memory that computes, taken now."""

    def weight_version(self) -> str: ...

    def set_weight_version(self, version: str) -> None: ...
