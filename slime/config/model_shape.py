"""A model's shape: read from a HuggingFace config.json as Megatron's values, and compared with given ones.

The letters of the families' formulas: h hidden size, f MLP size, L layers, V vocabulary, n heads, g key-value groups,
d channels of a head.
"""

from collections.abc import Callable, Mapping
from typing import Any

from slime.config.errors import ConfigError

Values = dict[str, Any]


def _llama(hf: Mapping[str, Any]) -> Values:
    _refuse(hf, "attention_bias")
    return {}


def _qwen2(hf: Mapping[str, Any]) -> Values:
    return {"add_qkv_bias": True}


def _qwen3(hf: Mapping[str, Any]) -> Values:
    _refuse(hf, "attention_bias")
    return {"qk_layernorm": True}


FAMILIES: dict[str, Callable[[Mapping[str, Any]], Values]] = {
    "LlamaForCausalLM": _llama,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}
"""Architecture of config.json -> what its family adds to the common shape."""


def architecture_of(hf: Mapping[str, Any]) -> str:
    """The architecture that config.json names.

    Raises:
        ConfigError: slime cannot train it; the message lists what it can.
    """
    name = (hf.get("architectures") or ["(none)"])[0]
    if name not in FAMILIES:
        raise ConfigError(
            f"--hf-checkpoint: the model's architecture is {name}, which slime cannot train. "
            f"It can train {', '.join(FAMILIES)}"
        )
    return str(name)


def shape_of(hf: Mapping[str, Any]) -> Values:
    """Megatron-LM's values (dest -> value) for a model of a known family.

    Raises:
        ConfigError: the architecture is unknown, or config.json asks for something that cannot be trained yet.
    """
    family = FAMILIES[architecture_of(hf)]
    _refuse(hf, "mlp_bias", "use_sliding_window", "quantization_config")
    if hf.get("hidden_act") not in (None, "silu"):
        raise ConfigError(
            f"--hf-checkpoint: config.json has hidden_act = {hf['hidden_act']}; slime trains silu (SwiGLU) only"
        )
    heads = _number(hf, "num_attention_heads")
    hidden = _number(hf, "hidden_size")
    return {
        "num_layers": _number(hf, "num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": _number(hf, "intermediate_size"),
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": int(hf.get("num_key_value_heads") or heads),
        "kv_channels": int(hf.get("head_dim") or hidden // heads),
        "vocab_size": _number(hf, "vocab_size"),
        "norm_epsilon": float(hf.get("rms_norm_eps", 1e-6)),
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not hf.get("tie_word_embeddings", False),
        "use_rotary_position_embeddings": True,
        "position_embedding_type": "rope",
        "rotary_base": rope_theta_of(hf),
        "attention_dropout": float(hf.get("attention_dropout") or 0.0),
        "hidden_dropout": 0.0,
        **({"max_position_embeddings": n} if (n := hf.get("max_position_embeddings")) else {}),
        **_rope_scaling(hf),
        **family(hf),
    }


def rope_theta_of(hf: Mapping[str, Any]) -> float:
    """Base of the rotary frequencies: `rope_parameters` (transformers 5) before `rope_theta`."""
    parameters = hf.get("rope_parameters") or {}
    return float(parameters.get("rope_theta") or hf.get("rope_theta") or 10000.0)


def _rope_scaling(hf: Mapping[str, Any]) -> Values:
    scaling = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {}
    if kind not in ("llama3", "linear"):
        raise ConfigError(
            f"--hf-checkpoint: config.json scales rotary positions by the rule {kind!r}; slime trains default, linear "
            "and llama3. Remove rope_scaling from config.json to train within the model's original length"
        )
    factor = float(scaling["factor"])
    if kind == "linear":
        return {"rotary_seq_len_interpolation_factor": factor}
    return {"use_rope_scaling": True, "rope_scaling_factor": factor, "rotary_scaling_factor": factor}


def _number(hf: Mapping[str, Any], key: str) -> int:
    if not isinstance(hf.get(key), int):
        raise ConfigError(f"--hf-checkpoint: config.json has {key} = {hf.get(key)!r}; it must be a whole number")
    return int(hf[key])


def _refuse(hf: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if hf.get(key):
            raise ConfigError(
                f"--hf-checkpoint: config.json has {key} = {hf[key]}, which slime cannot train for "
                f"{hf['architectures'][0]}; choose a model without it"
            )


# Megatron flag (its dest) -> what it is called in config.json, for errors.
COMPARED = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "untie_embeddings_and_output_weights": "not tie_word_embeddings",
    "add_qkv_bias": "the family's query-key-value bias",
    "qk_layernorm": "the family's query-key norm",
    "use_rope_scaling": "rope_scaling of the type llama3",
    "rotary_scaling_factor": "rope_scaling.factor",
    "rope_scaling_factor": "rope_scaling.factor",
    "rotary_seq_len_interpolation_factor": "rope_scaling.factor",
}


# What a config.json that says nothing means.
UNSAID = dict.fromkeys(
    ("untie_embeddings_and_output_weights", "add_qkv_bias", "qk_layernorm", "use_rope_scaling"), False
)
UNSCALED = dict.fromkeys(("rotary_scaling_factor", "rope_scaling_factor", "rotary_seq_len_interpolation_factor"), 1.0)


def compare_with_config(values: Mapping[str, Any], given: frozenset[str], hf: Mapping[str, Any]) -> None:
    """Compare the model flags that were given with config.json. Where --num-layers is given, a whole MODEL_ARGS array
    is assumed, so that an absent switch counts as off.

    Raises:
        ConfigError: everything that differs, with the flag and both values.
    """
    shape = shape_of(hf)
    is_whole = "num_layers" in given
    different = []
    for dest, hf_name in COMPARED.items():
        if not (dest in given or (is_whole and dest in UNSAID)):
            continue
        expected = shape.get(dest, (UNSAID | UNSCALED).get(dest))
        if expected is not None and not _same(values[dest], expected):
            flag = "--" + dest.replace("_", "-")
            different.append(f"{flag} is {values[dest]}, but config.json says {expected} ({hf_name})")
    if different:
        raise ConfigError(
            f"the model flags do not describe the model in --hf-checkpoint: {'; '.join(different)}. "
            "Source the script of that model from scripts/models/, or leave the model flags out: the shape is "
            "then read from config.json"
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        return abs(float(a) - float(b)) <= 1e-6 * max(abs(float(a)), abs(float(b)))
    return bool(a == b)


def count_parameters(values: Mapping[str, Any]) -> int:
    """Parameters of a dense model with these values (embedding rows unpadded)."""
    h, f, layers, vocab = (values[k] for k in ("hidden_size", "ffn_hidden_size", "num_layers", "vocab_size"))
    n, g, d = (values[k] for k in ("num_attention_heads", "num_query_groups", "kv_channels"))
    attention = h * (n + 2 * g) * d + n * d * h
    bias = (n + 2 * g) * d if values.get("add_qkv_bias") else 0
    norms = 2 * h + (2 * d if values.get("qk_layernorm") else 0)
    embeddings = vocab * h * (2 if values["untie_embeddings_and_output_weights"] else 1)
    return int(layers * (attention + bias + 3 * h * f + norms) + embeddings + h)
