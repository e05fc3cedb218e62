"""Megatron-LM's flags: fields of megatron-core's dataclasses under its names, and flags without a field."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .source import Module, field_docs, package_dir, unwrap_optional

CONFIGS = (
    ("megatron.core.transformer.transformer_config", "TransformerConfig"),
    ("megatron.core.transformer.transformer_config", "MLATransformerConfig"),
    ("megatron.core.model_parallel_config", "ModelParallelConfig"),
    ("megatron.core.optimizer.optimizer_config", "OptimizerConfig"),
    ("megatron.core.distributed.distributed_data_parallel_config", "DistributedDataParallelConfig"),
)

# Field -> (Megatron-LM's dest, Megatron-LM's flags). A field that is not here is its own dest and flag.
RENAMED = {
    "layernorm_epsilon": ("norm_epsilon", ["--norm-epsilon"]),
    "layernorm_zero_centered_gamma": ("apply_layernorm_1p", ["--apply-layernorm-1p"]),
    "num_moe_experts": ("num_experts", ["--num-experts"]),
    "num_layers_in_first_pipeline_stage": (
        "decoder_first_pipeline_num_layers",
        ["--decoder-first-pipeline-num-layers"],
    ),
    "num_layers_in_last_pipeline_stage": ("decoder_last_pipeline_num_layers", ["--decoder-last-pipeline-num-layers"]),
    "grad_reduce_in_fp32": ("accumulate_allreduce_grads_in_fp32", ["--accumulate-allreduce-grads-in-fp32"]),
    "check_for_nan_in_grad": ("check_for_nan_in_loss_and_grad", ["--check-for-nan-in-loss-and-grad"]),
    "use_te_rng_tracker": ("te_rng_tracker", ["--te-rng-tracker"]),
    "fp8": ("fp8", ["--fp8-format"]),
    "fp8_param": ("fp8_param_gather", ["--fp8-param-gather"]),
    "fp4": ("fp4", ["--fp4-format"]),
    "fp4_param": ("fp4_param", ["--fp4-param-gather"]),
    "overlap_p2p_comm": ("overlap_p2p_comm", ["--overlap-p2p-communication"]),
    "overlap_p2p_comm_warmup_flush": (
        "overlap_p2p_comm_warmup_flush",
        ["--overlap-p2p-communication-warmup-flush"],
    ),
    "microbatch_group_size_per_vp_stage": (
        "microbatch_group_size_per_vp_stage",
        ["--microbatch-group-size-per-virtual-pipeline-stage"],
    ),
    "barrier_with_L1_time": ("barrier_with_L1_time", ["--barrier-with-level-1-timing"]),
    "bucket_size": ("ddp_bucket_size", ["--ddp-bucket-size"]),
    "average_in_collective": ("ddp_average_in_collective", ["--ddp-average-in-collective"]),
    "pad_buckets_for_high_nccl_busbw": (
        "ddp_pad_buckets_for_high_nccl_busbw",
        ["--ddp-pad-buckets-for-high-nccl-busbw"],
    ),
    "reduce_scatter_with_fp32_accumulation": (
        "ddp_reduce_scatter_with_fp32_accumulation",
        ["--ddp-reduce-scatter-with-fp32-accumulation"],
    ),
    "bias_activation_fusion": ("bias_activation_fusion", ["--bias-activation-fusion"]),
    "apply_rope_fusion": ("apply_rope_fusion", ["--rope-fusion"]),
    "perform_initialization": ("perform_initialization", ["--initialization"]),
}

# Megatron-LM's flags that switch a field off: flag -> field.
SWITCH_OFF = {
    "--disable-bias-linear": "add_bias_linear",
    "--no-bias-gelu-fusion": "bias_activation_fusion",
    "--no-bias-swiglu-fusion": "bias_activation_fusion",
    "--disable-mamba-mem-eff-path": "use_mamba_mem_eff_path",
    "--disable-tp-comm-bulk-dgrad": "tp_comm_bulk_dgrad",
    "--disable-tp-comm-bulk-wgrad": "tp_comm_bulk_wgrad",
    "--disable-tp-comm-overlap-ag": "tp_comm_overlap_ag",
    "--disable-tp-comm-overlap-rs": "tp_comm_overlap_rs",
    "--disable-tp-comm-split-ag": "tp_comm_split_ag",
    "--disable-tp-comm-split-rs": "tp_comm_split_rs",
}

# Where Megatron-LM's default differs from the dataclass's.
DEFAULTS = {
    "rope_type": None,
    "q_lora_rank": None,
    "attention_softmax_in_fp32": False,
    "check_for_nan_in_grad": True,
}

# Fields of several dataclasses that one Megatron-LM flag sets.
ALSO_SETS = {"fp8_param": ["fp8_param_gather"]}

# Arguments given to the process, not to a run: set from --bf16/--fp16 or by the trainer.
NOT_FLAGS = {"params_dtype", "pipeline_dtype", "autocast_dtype", "fp8_param_gather"}

DTYPES = ["fp32", "bf16", "fp16", "fp8"]
POSITION_EMBEDDINGS = ["learned_absolute", "rope", "mrope", "relative", "none"]

# Megatron-LM's flags without a dataclass field: (flag, type or switch, default, help[, choices]).
OTHER: tuple[tuple[Any, ...], ...] = (
    ("--swiglu", bool, False, "Gated linear unit with SiLU in the MLP."),
    ("--squared-relu", bool, False, "Squared ReLU in the MLP."),
    ("--quick-geglu", bool, False, "Quick GeGLU in the MLP."),
    ("--group-query-attention", bool, False, "Share keys and values among groups of heads."),
    ("--untie-embeddings-and-output-weights", bool, False, "Separate weights for embedding and output layer."),
    ("--position-embedding-type", str, "learned_absolute", "Position embedding.", POSITION_EMBEDDINGS),
    ("--use-rotary-position-embeddings", bool, False, "Rotary position embeddings (older spelling)."),
    ("--no-position-embedding", "off:add_position_embedding", True, "No learned position embedding."),
    ("--use-rope-scaling", bool, False, "Llama-3 style scaling of rotary frequencies."),
    ("--rope-scaling-factor", float, 8.0, "Factor of that scaling."),
    ("--rotary-seq-len-interpolation-factor", int, None, "Linear interpolation of rotary positions."),
    ("--max-position-embeddings", int, None, "Longest sequence the position embedding knows."),
    ("--vocab-size", int, None, "Rows of the vocabulary before padding."),
    ("--make-vocab-size-divisible-by", int, 128, "Pad the vocabulary to a multiple of this times TP."),
    ("--seq-length", int, None, "Longest sequence, in tokens."),
    ("--spec", "list", None, "Module and function of a custom layer spec (two words)."),
    ("--post-self-attn-layernorm", bool, False, "RMSNorm on the attention's output (GLM-4)."),
    ("--post-mlp-layernorm", bool, False, "RMSNorm on the MLP's output (GLM-4)."),
    ("--use-gated-attention", bool, False, "Gated attention (Qwen3-Next, Qwen3.5)."),
    ("--enable-experimental", bool, False, "Allow Megatron's experimental features."),
    ("--recompute-activations", bool, False, "Short for --recompute-granularity selective."),
    ("--num-layers-per-virtual-pipeline-stage", int, None, "Layers of one virtual pipeline stage."),
    ("--num-virtual-stages-per-pipeline-rank", int, None, "Virtual pipeline stages on each rank."),
    (
        "--lr-decay-style",
        str,
        "linear",
        "How the learning rate decays.",
        ["constant", "linear", "cosine", "inverse-square-root", "WSD"],
    ),
    ("--lr-decay-iters", int, None, "Steps until the learning rate reaches --min-lr. Default: all of the run."),
    ("--lr-warmup-iters", int, 0, "Steps of linear warm-up."),
    ("--lr-warmup-fraction", float, None, "Share of the decay steps that warm up."),
    ("--lr-warmup-init", float, 0.0, "Learning rate at the start of the warm-up."),
    (
        "--lr-wsd-decay-style",
        str,
        "exponential",
        "Decay after the stable phase.",
        ["exponential", "linear", "cosine", "minus_sqrt"],
    ),
    ("--lr-wsd-decay-iters", int, None, "Steps of that decay."),
    ("--start-weight-decay", float, None, "Weight decay at the start."),
    ("--end-weight-decay", float, None, "Weight decay at the end."),
    ("--weight-decay-incr-style", str, "constant", "How weight decay changes.", ["constant", "linear", "cosine"]),
    ("--override-opt_param-scheduler", bool, False, "Take the schedule from the command line, not the checkpoint."),
    ("--use-checkpoint-opt_param-scheduler", bool, False, "Take the schedule from the checkpoint."),
    ("--train-iters", int, None, "Steps of the run; derived from the rollouts."),
    ("--ckpt-format", str, "torch_dist", "Checkpoint format.", ["torch_dist", "torch"]),
    ("--ckpt-step", int, None, "Iteration to load. Default: the newest."),
    ("--no-load-optim", bool, None, "Do not load the optimizer's state."),
    ("--no-load-rng", bool, None, "Do not load the random state."),
    ("--no-save-rng", bool, None, "Do not save the random state."),
    ("--finetune", bool, False, "Load weights only and start at step 0."),
    ("--exit-on-missing-checkpoint", bool, False, "Stop when --load has no checkpoint."),
    ("--use-persistent-ckpt-worker", bool, False, "One background process for all asynchronous saves."),
    ("--ckpt-assume-constant-structure", bool, False, "Reuse the plan of the first save."),
    ("--ckpt-fully-parallel-load", bool, False, "Share the reading of a checkpoint among data-parallel ranks."),
    ("--ckpt-fully-parallel-save", bool, True, "Share the writing among data-parallel ranks."),
    ("--no-ckpt-fully-parallel-save", "off:ckpt_fully_parallel_save", True, "Do not."),
    ("--dist-ckpt-strictness", str, "assume_ok_unexpected", "What unexpected keys of a checkpoint do."),
    ("--dist-ckpt-save-pre-mcore-014", bool, False, "Write the optimizer's state in the older layout."),
    ("--use-dist-ckpt", bool, False, "Accepted: checkpoints are distributed ones."),
    ("--auto-detect-ckpt-format", bool, False, "Accepted: the format is detected."),
    ("--use-mcore-models", bool, False, "Accepted: models are Megatron-core's."),
    ("--use-flash-attn", bool, False, "Accepted: see --attention-backend."),
    ("--tokenizer-type", str, None, "Tokenizer; HuggingFaceTokenizer."),
    ("--tokenizer-model", str, None, "Its folder. Default: --hf-checkpoint."),
    ("--enable-gloo-process-groups", bool, True, "Gloo groups beside the device's."),
    ("--disable-gloo-process-groups", "off:enable_gloo_process_groups", True, "No gloo groups."),
    ("--init-method-xavier-uniform", bool, False, "Xavier initialisation."),
    ("--data-parallel-random-init", bool, False, "Different random weights on each data-parallel rank."),
    ("--use-tp-pp-dp-mapping", bool, False, "Order ranks tp-pp-dp instead of tp-dp-pp."),
    ("--nccl-communicator-config-path", str, None, "YAML with NCCL settings for each group."),
    ("--log-throughput", bool, False, "Accepted: throughput is always logged."),
    ("--log-interval", int, 100, "Accepted: every step is logged."),
    ("--timing-log-level", int, 0, "Detail of Megatron's timers.", [0, 1, 2]),
    ("--manual-gc", bool, False, "Collect garbage at fixed steps only."),
    ("--manual-gc-interval", int, 0, "Steps between."),
)


def rows(folder: Path | None = None) -> list[dict[str, Any]]:
    """Every Megatron flag as a row of the table, sorted as the dataclasses have them."""
    root = package_dir("megatron.core", folder)
    table: dict[str, dict[str, Any]] = {}
    for dotted, class_name in CONFIGS:
        module = Module(root, "megatron.core", dotted)
        class_def = module.classes[class_name]
        docs = field_docs(class_def)
        for node in class_def.body:
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            row = _row(module, node, node.target.id, class_name, docs)
            if row is not None and row["fields"][0] not in table:
                table[row["fields"][0]] = row
    return [*table.values(), *_switches(table), *_others()]


def _row(
    module: Module, node: ast.AnnAssign, field: str, class_name: str, docs: dict[str, str]
) -> dict[str, Any] | None:
    parsing = _parsing(module, unwrap_optional(node.annotation), field)
    if parsing is None or field in NOT_FLAGS or field.startswith("_"):
        return None
    dest, names = RENAMED.get(field, (field, []))
    own = "--" + field.replace("_", "-")
    names = [*names, own] if own not in names else names
    _check_own_name(node, field, names)
    return {
        "names": names,
        "dest": dest,
        **parsing,
        "default": DEFAULTS.get(field, _default(module, node.value)),
        "help": docs.get(field, ""),
        "group": class_name,
        "fields": [field, *ALSO_SETS.get(field, [])],
    }


def _parsing(module: Module, annotation: ast.expr, field: str) -> dict[str, Any] | None:
    """How the flag is parsed; None for callables, dtypes of the process and other things no command line can say."""
    text = ast.unparse(annotation)
    match annotation:
        case ast.Name(id="bool"):
            return {"action": "on_or_off"}
        case ast.Name(id="int" | "float" | "str" as name):
            return {"action": "value", "type": name}
        case ast.Name(id="AttnBackend"):
            enum = module.other("megatron.core.transformer.enums").classes["AttnBackend"]
            members = [n.targets[0].id for n in enum.body if isinstance(n, ast.Assign)]  # type: ignore[attr-defined]
            return {"action": "value", "type": "str", "choices": members}
        case ast.Subscript(value=ast.Name(id="Literal"), slice=literals):
            return {"action": "value", "type": "str", "choices": module.value(_as_list(literals))}
        case ast.Subscript(value=ast.Name(id="List" | "list" | "Tuple"), slice=inner):
            element = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
            return {"action": "list", "type": ast.unparse(element), "nargs": "+"}
    if text == "torch.dtype" and field.endswith("_dtype"):
        return {"action": "value", "type": "str", "choices": DTYPES}
    if text == "Union[int, List[int]]":
        return {"action": "value", "type": "list_expression"}
    if text.startswith("Union[str, list, Pipeline"):
        return {"action": "value", "type": "str"}
    for scalar in ("str", "float"):
        if text.startswith(f"Union[{scalar},"):
            return {"action": "one_or_more", "type": scalar, "nargs": "+"}
    return None


def _default(module: Module, node: ast.expr | None) -> Any:
    text = ast.unparse(node) if node else "None"
    if text.startswith("torch."):
        return {"torch.float32": "fp32"}.get(text)
    if text.startswith("AttnBackend."):
        return text.split(".")[1]
    if isinstance(node, ast.Call):
        node = _keyword_default(node)
    value = module.value_or(node)
    return float(value) if isinstance(value, int) and value > 2**31 else value


def _keyword_default(call: ast.Call) -> ast.expr | None:
    """Default of `field(...)`: the one its metadata gives the command line, if any, else the field's own."""
    for part in ast.walk(call):
        if isinstance(part, ast.Dict):
            for key, value in zip(part.keys, part.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "default":
                    return value
    keywords = {k.arg: k.value for k in call.keywords}
    if "default_factory" in keywords:
        return ast.List(elts=[], ctx=ast.Load())
    return keywords.get("default")


def _check_own_name(node: ast.AnnAssign, field: str, names: list[str]) -> None:
    """Megatron-core marks some fields with Megatron-LM's flag; each of those must be among ours."""
    marked = [
        element.value
        for part in ast.walk(node)
        if isinstance(part, ast.Dict)
        for key, value in zip(part.keys, part.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "arg_names" and isinstance(value, ast.List)
        for element in value.elts
        if isinstance(element, ast.Constant)
    ]
    unknown = [
        m for m in marked if m not in names and m not in SWITCH_OFF and "--" + m.removeprefix("--no-") not in names
    ]
    if unknown:
        raise SystemExit(f"megatron-core names the flag of {field} {unknown}; add it to RENAMED in {__file__}")


def _switches(table: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for name, field in SWITCH_OFF.items():
        row = table[field]
        yield {
            "names": [name],
            "dest": row["dest"],
            "action": "switch_off",
            "default": row["default"],
            "help": f"Same as --no-{row['names'][0].removeprefix('--')}.",
            "group": row["group"],
            "fields": row["fields"],
        }


def _others() -> Iterator[dict[str, Any]]:
    for name, kind, default, text, *choices in OTHER:
        dest = name.removeprefix("--").replace("-", "_")
        row: dict[str, Any] = {"names": [name], "dest": dest, "default": default, "help": text, "group": "Megatron-LM"}
        if kind is bool:
            row["action"] = "switch_on"
        elif kind == "list":
            row |= {"action": "list", "type": "str", "nargs": "*"}
        elif isinstance(kind, str):
            row |= {"action": "switch_off", "dest": kind.removeprefix("off:")}
        else:
            row |= {"action": "value", "type": kind.__name__}
        yield row | ({"choices": choices[0]} if choices else {})


def _as_list(literals: ast.expr) -> ast.expr:
    return literals if isinstance(literals, ast.Tuple) else ast.List(elts=[literals], ctx=ast.Load())
