"""Whether trainer and engines fit on a shared GPU together, or have to give their memory back in turns: estimates.

Letters: P parameters of a trainer rank, h hidden size, f MLP size, n heads, g key-value groups, d channels of a head,
L layers, V vocabulary, T tokens of a micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slime.config.batches import Batch
from slime.config.config import Config
from slime.config.devices import Parallel, Placement
from slime.config.model_shape import count_parameters

GIB = 1 << 30
_ENGINE_MAX = 0.5
"""Of a shared GPU: keys and values beyond that rarely make decoding faster."""
_ENGINE_MIN = 0.15
_UNCOUNTED_BYTES = 12 * GIB  # two CUDA contexts, NCCL's and cuBLAS's buffers, the engine's graphs and its activations
_MARGIN = 1.3  # of what training allocates over what its tensors sum up to: fragments, and temporaries of the backward
_CHUNK_TOKENS = 2048  # tokens whose logits exist at a time


@dataclass(frozen=True)
class MemoryPlan:
    """How a shared GPU's memory is divided."""

    trainer_bytes: int
    """Estimate of the most that a trainer rank holds."""
    engine_fraction: float | None
    """Of the GPU, for an engine's weights and its keys and values; None where SGLang or the user decides."""
    stays: bool
    """Whether both stay on the GPU all the time."""
    words: str


def divide_memory(
    config: Config, placement: Placement, parallel: Parallel, batch: Batch, values: Mapping[str, Any]
) -> tuple[Placement, MemoryPlan | None]:
    """The placement with `offload_*` and `engine_memory_fraction` settled, and why; None where no GPU is shared."""
    if placement.device != "cuda" or not placement.colocate or not placement.num_engines or "num_layers" not in values:
        return placement, None
    trainer_bytes = trainer_memory(config, parallel, batch, values)
    total = config.machine.gpu_memory_bytes
    cluster = config.cluster
    asked = cluster.offload or cluster.offload_train is not None or cluster.offload_rollout is not None
    given = config.sglang.get("sglang_mem_fraction_static") if "sglang_mem_fraction_static" in config.given else None
    trainer = f"trainer about {trainer_bytes / GIB:.0f} GiB"
    if total is None:
        return placement, MemoryPlan(trainer_bytes, None, False, f"{trainer}; the GPU's memory is not known here")
    left = (total - trainer_bytes - _UNCOUNTED_BYTES) / total
    fraction = float(given) if given is not None else min(_ENGINE_MAX, int(100 * left) / 100)
    of_total = f"of {total / GIB:.0f} GiB"
    if asked and not placement.offload_train:
        chosen = None if given is not None else max(fraction, 0.05)
        words = f"{trainer}, which stays, {of_total}; engines {fraction:.2f}"
        return replace(placement, engine_memory_fraction=chosen), MemoryPlan(trainer_bytes, chosen, False, words)
    fits = fraction <= left and fraction >= _ENGINE_MIN
    if asked or not fits or config.train.release_train or config.algorithm.advantage_estimator == "ppo":
        why = "as asked" if asked else "both do not fit"
        return placement, MemoryPlan(trainer_bytes, None, False, f"{trainer} {of_total}; they take turns ({why})")
    chosen = None if given is not None else fraction
    words = f"{trainer} {of_total}, engines {fraction:.2f} of it: both fit, so neither gives its memory back"
    settled = replace(placement, offload_train=False, offload_rollout=False, engine_memory_fraction=chosen)
    return settled, MemoryPlan(trainer_bytes, chosen, True, words)


def trainer_memory(config: Config, parallel: Parallel, batch: Batch, values: Mapping[str, Any]) -> int:
    """Bytes that a trainer rank holds at most: weights, fp32 gradients, Adam's fp32 weights and moments, activations.

    Adam's part is divided over data-parallel ranks. Activations are what the layers of this package keep for the
    backward pass; --recompute-granularity full keeps one hidden state a layer.
    """
    shards = parallel.tensor * parallel.pipeline
    parameters = count_parameters(values) / shards
    states = parameters * (2 + 4 + 12 / parallel.data)
    h, f, layers = (values[k] for k in ("hidden_size", "ffn_hidden_size", "num_layers"))
    n, g, d = (values[k] for k in ("num_attention_heads", "num_query_groups", "kv_channels"))
    whole_layer = 2 * (4 * h + 2 * n * d + 2 * g * d + 4 * f)  # bytes a token
    recomputes_all = values.get("recompute_granularity") == "full"
    kept = 2 * h * layers + whole_layer if recomputes_all else whole_layer * layers
    tokens = _micro_batch_tokens(config, batch)
    logits = min(tokens, _CHUNK_TOKENS) * values["vocab_size"] * (2 + 4 + 4)
    return int(_MARGIN * (states + (tokens * kept / parallel.context + logits) / shards))


def _micro_batch_tokens(config: Config, batch: Batch) -> int:
    r = config.rollout
    longest = r.rollout_max_context_len or (r.rollout_max_response_len or 1024) + (r.rollout_max_prompt_len or 1024)
    if config.batch.use_dynamic_batch_size and config.batch.max_tokens_per_gpu:
        return max(config.batch.max_tokens_per_gpu, longest)
    return longest * (config.batch.micro_batch_size or 1)
