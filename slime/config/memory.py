"""Whether trainer and engines fit on a shared GPU together, or have to give their memory back in turns: estimates.

Letters: P parameters of a trainer rank, h hidden size, f MLP size, n heads, g key-value groups, d channels of a head,
L layers, V vocabulary, T tokens of a micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slime.config.batches import Batch, longest_response
from slime.config.config import Config
from slime.config.devices import Parallel, Placement
from slime.config.model_shape import count_parameters

GIB = 1 << 30
_ENGINE_MAX = 0.5
"""Of a shared GPU: keys and values beyond that rarely make decoding faster."""
_ENGINE_MIN = 0.15
_CACHE_MIN = 0.1
"""Of a shared GPU, for keys and values beside an engine's weights: with less it would generate too slowly."""
_UNCOUNTED_BYTES = 12 * GIB  # two CUDA contexts, NCCL's and cuBLAS's buffers, the engine's graphs and its activations
_MARGIN = 1.3  # of what training allocates over what its tensors sum up to: fragments, and temporaries of the backward
_USUAL_PROMPT_LEN = 1024
_CHUNK_TOKENS = 4096  # tokens whose logits are made at a time
_KEPT_LOGITS = 1 / 24  # of a GPU, at most, for logits that wait for the backward pass
_TOO_LARGE = (
    "it will hardly fit; try --recompute-granularity full --recompute-method uniform --recompute-num-layers 1, less "
    "--max-tokens-per-gpu or --micro-batch-size, --tensor-model-parallel-size 2 --sequence-parallel, or more GPUs"
)


@dataclass(frozen=True)
class MemoryPlan:
    """How a GPU's memory is divided."""

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
    """The placement with `offload_*` and `engine_memory_fraction` settled, and why; None where no GPU trains."""
    if placement.device != "cuda" or config.debug.debug_rollout_only or "num_layers" not in values:
        return placement, None
    trainer_bytes = trainer_memory(config, parallel, batch, values)
    total = config.machine.gpu_memory_bytes
    if total is not None and trainer_bytes > total:
        words = f"trainer about {trainer_bytes / GIB:.0f} GiB, but a GPU has {total / GIB:.0f}: {_TOO_LARGE}"
        return placement, MemoryPlan(trainer_bytes, None, False, words)
    if not placement.colocate or not placement.num_engines:
        of_total = "" if total is None else f" of {total / GIB:.0f} GiB"
        return placement, MemoryPlan(
            trainer_bytes, None, True, f"trainer about {trainer_bytes / GIB:.0f} GiB{of_total}"
        )
    cluster = config.cluster
    asked = cluster.offload or cluster.offload_train is not None or cluster.offload_rollout is not None
    given = config.sglang.get("sglang_mem_fraction_static") if "sglang_mem_fraction_static" in config.given else None
    trainer = f"trainer about {trainer_bytes / GIB:.0f} GiB"
    if total is None:
        return placement, MemoryPlan(trainer_bytes, None, False, f"{trainer}; the GPU's memory is not known here")
    left = (total - trainer_bytes - _UNCOUNTED_BYTES) / total
    fraction = float(given) if given is not None else min(_ENGINE_MAX, int(100 * left) / 100)
    of_total = f"of {total / GIB:.0f} GiB"
    if asked and not (placement.offload_train and placement.offload_rollout):
        chosen = None if given is not None else max(fraction, 0.05)
        sides = {"the trainer": placement.offload_train, "the engine": placement.offload_rollout}
        staying = " and ".join(side for side, gives_back in sides.items() if not gives_back)
        verb = "stay" if " and " in staying else "stays"
        words = f"{trainer} {of_total}, engines {chosen or fraction:.2f} of it: {staying} {verb} on the GPU (as asked)"
        return replace(placement, engine_memory_fraction=chosen), MemoryPlan(trainer_bytes, chosen, False, words)
    engine_weights = 2 * count_parameters(values) / cluster.rollout_num_gpus_per_engine
    fits = fraction <= left and fraction >= max(_ENGINE_MIN, engine_weights / total + _CACHE_MIN)
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
    backward pass: with --recompute-granularity full one hidden state a layer, with --recompute-modules mlp nothing of
    the MLP. (core_attn alone, which --recompute-activations means, changes nothing: no scores are kept anyway.) Tensor
    parallelism divides hidden states only with --sequence-parallel. A pipeline stage has fewer layers, and as many
    more micro-batches under way.
    """
    tensor = parallel.tensor
    parameters = count_parameters(values) / (tensor * parallel.pipeline)
    states = parameters * (2 + 4 + 12 / parallel.data)
    h, f, layers = (values[k] for k in ("hidden_size", "ffn_hidden_size", "num_layers"))
    n, g, d = (values[k] for k in ("num_attention_heads", "num_query_groups", "kv_channels"))
    hidden = 2 * h / (tensor if values.get("sequence_parallel") else 1)  # bytes a token
    mlp = 2 * 4 * f / tensor
    whole_layer = 4 * hidden + 2 * (2 * n * d + 2 * g * d) / tensor + mlp
    granularity = values.get("recompute_granularity")
    if granularity == "full":
        kept = hidden * layers + whole_layer
    elif granularity == "selective" and "mlp" in (values.get("recompute_modules") or ()):
        kept = (whole_layer - mlp) * layers + mlp
    else:
        kept = whole_layer * layers
    tokens = _micro_batch_tokens(config, batch)
    per_row = 2 * values["vocab_size"] / tensor
    kept_logits = min(tokens * per_row, _KEPT_LOGITS * (config.machine.gpu_memory_bytes or 80 * GIB))
    logits = kept_logits + min(tokens, _CHUNK_TOKENS) * per_row
    return int(_MARGIN * (states + tokens * kept / parallel.context + logits))


def _micro_batch_tokens(config: Config, batch: Batch) -> int:
    r = config.rollout
    longest = r.rollout_max_context_len or longest_response(config) + (r.rollout_max_prompt_len or _USUAL_PROMPT_LEN)
    if config.batch.use_dynamic_batch_size and config.batch.max_tokens_per_gpu:
        return max(config.batch.max_tokens_per_gpu, longest)
    return longest * (config.batch.micro_batch_size or 1)
