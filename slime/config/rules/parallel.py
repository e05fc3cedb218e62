"""Rules of the trainer's parallel sizes, its number formats and its recomputation."""

from typing import Any

from slime.config.config import Config
from slime.config.errors import ConfigError

SPARSE_ATTENTION = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")


def sizes_are_positive(config: Config) -> None:
    """No parallel size is below 1."""
    for dest in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    ):
        size = config.megatron.get(dest)
        if size is not None and size < 1:
            raise ConfigError(f"{_flag(dest)} is {size}; it must be at least 1, e.g. {_flag(dest)} 1")


def heads_divide_by_tensor_parallel(config: Config) -> None:
    """Each tensor-parallel rank takes an equal share of heads and key-value groups."""
    tensor = config.megatron.get("tensor_model_parallel_size") or 1
    for dest in ("num_attention_heads", "num_query_groups"):
        count = _shape(config, dest)
        if count and count % tensor and (dest == "num_attention_heads" or tensor % count):
            fits = max(d for d in range(1, tensor + 1) if count % d == 0)
            raise ConfigError(
                f"--tensor-model-parallel-size {tensor} does not divide the model's {count} "
                f"{dest.removeprefix('num_').replace('_', ' ')}; the nearest smaller size that does is {fits}"
            )


def layers_divide_by_pipeline(config: Config) -> None:
    """Each pipeline stage takes an equal share of layers, unless the shares are given."""
    megatron = config.megatron
    stages, layers = megatron.get("pipeline_model_parallel_size") or 1, _shape(config, "num_layers")
    given = [d for d in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers") if megatron.get(d)]
    if stages == 1 and given:
        raise ConfigError(f"{_flag(given[0])} {megatron[given[0]]} is not used without a pipeline; drop the flag")
    free = megatron.get("pipeline_model_parallel_layout") or given
    if layers and stages > 1 and layers % stages and not free:
        raise ConfigError(
            f"--pipeline-model-parallel-size {stages} does not divide the model's {layers} layers; "
            f"use {max(d for d in range(1, stages + 1) if layers % d == 0)}, or say how many layers the first or last "
            "stage takes (--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers)"
        )


def virtual_stages_take_equal_shares(config: Config) -> None:
    """Interleaved: every rank cuts its layers into as many equal pieces, and passes micro-batches on in groups."""
    megatron = config.megatron
    stages, layers = megatron.get("pipeline_model_parallel_size") or 1, _shape(config, "num_layers")
    first, last = (megatron.get(f"decoder_{end}_pipeline_num_layers") for end in ("first", "last"))
    pieces = megatron.get("num_virtual_stages_per_pipeline_rank") or megatron.get(
        "virtual_pipeline_model_parallel_size"
    )
    if megatron.get("num_layers_per_virtual_pipeline_stage") is not None and (first or last):
        raise ConfigError(
            "--num-layers-per-virtual-pipeline-stage is for stages of equal size; with --decoder-first-pipeline-"
            "num-layers or --decoder-last-pipeline-num-layers give --num-virtual-stages-per-pipeline-rank instead"
        )
    if pieces and pieces > 1 and stages > 1 and layers:
        _check_shares(stages, layers, first, last, pieces)
    group = megatron.get("microbatch_group_size_per_vp_stage")
    if group is not None and not (pieces or megatron.get("num_layers_per_virtual_pipeline_stage")):
        raise ConfigError(
            f"--microbatch-group-size-per-vp-stage {group} is for interleaved pipeline stages; drop it, or add "
            "--num-virtual-stages-per-pipeline-rank 2"
        )
    if group is not None and group < stages:
        raise ConfigError(
            f"--microbatch-group-size-per-vp-stage {group} is below --pipeline-model-parallel-size {stages}: the "
            f"pipeline could not be filled; use {stages} or more"
        )


def _check_shares(stages: int, layers: int, first: int | None, last: int | None, pieces: int) -> None:
    """Every stage's layers divide by the number of its pieces."""
    ends = [share for share in (first, last) if share]
    middle = stages - len(ends)
    shares = ends + ([(layers - sum(ends)) // middle] if middle else [])
    uneven = [share for share in shares if share % pieces]
    if uneven:
        raise ConfigError(
            f"a pipeline stage of {uneven[0]} layers cannot be cut into {pieces} equal virtual stages "
            "(--num-virtual-stages-per-pipeline-rank or --virtual-pipeline-model-parallel-size); use "
            f"{max(d for d in range(1, pieces + 1) if all(share % d == 0 for share in shares))}, or other stages"
        )


def context_parallel_gathers_sparse_attention_only(config: Config) -> None:
    """A contiguous split of the context is implemented for sparse attention."""
    context = config.megatron.get("context_parallel_size") or 1
    if not config.train.allgather_cp or context == 1:
        return
    names = (config.files.hf_config or {}).get("architectures") or []
    if not set(names) & set(SPARSE_ATTENTION):
        raise ConfigError(
            f"--allgather-cp is for sparse attention ({', '.join(SPARSE_ATTENTION)}); "
            "drop the flag to split the context in a zig-zag"
        )


def one_half_precision(config: Config) -> None:
    """bf16 or fp16, and fp16 only on GPUs."""
    if config.megatron.get("bf16") and config.megatron.get("fp16") and {"bf16", "fp16"} <= config.given:
        raise ConfigError("--bf16 and --fp16 exclude each other; drop one of them")
    on_cpu = config.cluster.device == "cpu" or (config.cluster.device == "auto" and config.machine.num_gpus == 0)
    if config.megatron.get("fp16") and on_cpu:
        raise ConfigError("--fp16: CPUs train in bf16 or fp32; drop the flag (the plan says which is taken and why)")


def recomputation_is_complete(config: Config) -> None:
    """--recompute-granularity says whether anything is recomputed; each of the others belongs to one of its values."""
    megatron = config.megatron
    full = ("recompute_method", "recompute_num_layers")
    given = [dest for dest in full if megatron.get(dest) is not None]
    granularity = megatron.get("recompute_granularity")
    if granularity is None and megatron.get("recompute_activations"):
        granularity = "selective"
    if granularity != "full" and given:
        raise ConfigError(
            f"{' and '.join(map(_flag, given))} recomputes nothing without --recompute-granularity full; add that, or "
            f"drop {'it' if len(given) == 1 else 'them'}"
        )
    if granularity != "selective" and "recompute_modules" in config.given:
        raise ConfigError(
            "--recompute-modules recomputes nothing without --recompute-granularity selective; "
            f"{'drop it' if granularity == 'full' else 'add that'}"
        )
    if granularity != "full":
        return
    lacks = [
        text
        for text, dest in (("--recompute-method uniform", full[0]), ("--recompute-num-layers 1", full[1]))
        if megatron.get(dest) is None
    ]
    if lacks:
        raise ConfigError(f"--recompute-granularity full needs {' and '.join(lacks)}; add that")
    _check_recomputed_layers(config, megatron["recompute_method"], megatron["recompute_num_layers"])


def _check_recomputed_layers(config: Config, method: str, number: int) -> None:
    """Uniform blocks fill a stage evenly: Megatron would run beyond its last layer, or for ever with 0."""
    if number < 1:
        raise ConfigError(f"--recompute-num-layers is {number}; it must be at least 1, e.g. --recompute-num-layers 1")
    uneven = [share for share in _layers_of_stages(config) if share % number]
    if method == "uniform" and uneven:
        fits = max(d for d in range(1, number + 1) if all(share % d == 0 for share in _layers_of_stages(config)))
        raise ConfigError(
            f"--recompute-num-layers {number} with --recompute-method uniform does not divide the {uneven[0]} layers "
            f"of a pipeline stage; use {fits}"
        )


def _layers_of_stages(config: Config) -> list[int]:
    """Layers of each kind of pipeline stage, of its pieces where stages are interleaved; none if they are not known."""
    megatron, layers = config.megatron, _shape(config, "num_layers")
    stages = megatron.get("pipeline_model_parallel_size") or 1
    if not layers or megatron.get("pipeline_model_parallel_layout"):
        return []
    if per_piece := megatron.get("num_layers_per_virtual_pipeline_stage"):
        return [per_piece]
    pieces = megatron.get("num_virtual_stages_per_pipeline_rank") or 1
    pieces = megatron.get("virtual_pipeline_model_parallel_size") or pieces
    ends = [megatron.get(f"decoder_{end}_pipeline_num_layers") for end in ("first", "last")]
    given = [share for share in ends if share]
    middle = stages - len(given)
    shares = given + ([(layers - sum(given)) // middle] if middle > 0 else [])
    return [share // pieces for share in shares]


def learning_rates_are_ordered(config: Config) -> None:
    """The learning rate decays downwards."""
    smallest = config.megatron.get("min_lr")
    if smallest is not None and smallest > config.train.lr:
        raise ConfigError(f"--min-lr {smallest} is above --lr {config.train.lr}; lower the one or raise the other")


def one_warmup(config: Config) -> None:
    """The warm-up is a share or a number of steps."""
    megatron = config.megatron
    if megatron.get("lr_warmup_fraction") is not None and megatron.get("lr_warmup_iters"):
        raise ConfigError("--lr-warmup-fraction and --lr-warmup-iters both say how long to warm up; keep one of them")


def _shape(config: Config, dest: str) -> Any:
    """A number of the model: given, else from config.json."""
    if config.megatron.get(dest) is not None and (dest in config.given or not config.files.hf_config):
        return config.megatron[dest]
    names = {
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads",
        "num_layers": "num_hidden_layers",
    }
    return (config.files.hf_config or {}).get(names[dest])


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


RULES = (
    sizes_are_positive,
    heads_divide_by_tensor_parallel,
    layers_divide_by_pipeline,
    virtual_stages_take_equal_shares,
    context_parallel_gathers_sparse_attention_only,
    one_half_precision,
    recomputation_is_complete,
    learning_rates_are_ordered,
    one_warmup,
)
