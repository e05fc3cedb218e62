"""transformers' own model code with our linear layers, norms and attention put in its places.

Every family whose layers go through transformers' attention interface works; whether one does is tried at start-up with
a pass over two tokens, so that a family that would be computed wrongly is refused instead.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slime.backends.embedded.attention import Batch, CachedAttention, ShapeProbe
from slime.backends.embedded.cache import KVShape, SlotCache
from slime.backends.embedded.layer import FusedDecoderLayer, FusedPass, can_be_fused, can_pass
from slime.backends.embedded.linear import FusedRMSNorm, LinearPart, StackedLinear
from slime.backends.embedded.rotation import RotationTable, changing_rotations
from slime.backends.embedded.weights import ServedWeights, load_folder

STACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sibling linear layers that read the same input."""

TRIAL_POSITIONS = [*range(8), 30, 31, 77, 111, 150, 151, 199, 200]
"""Where the tokens of the start-up trial stand: near and far, so that a different rotation shows."""
TRIAL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest relative difference of the logits between transformers' layers and ours (30 layers in bf16: about 1e-2)."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class ServedModel:
    """One causal language model, ready to compute packed batches.

    weights: names and memory; cache_shapes: what each layer keeps of one position; config: transformers' config.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype, *, load: bool = True) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.path, self.dtype = str(path), dtype
        self.attention = CachedAttention()
        implementation = f"slime_embedded_{id(self.attention):x}"
        ALL_ATTENTION_FUNCTIONS.register(implementation, self.attention)
        self.config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        self.text_config = self.config.get_text_config()
        _refuse_unserved(self.text_config)
        with no_init_weights():
            self.module = AutoModelForCausalLM.from_config(self.config, dtype=dtype, attn_implementation=implementation)
        self.module.eval().requires_grad_(False)
        self.is_tied = bool(self.text_config.tie_word_embeddings)
        self.weights = _replace_layers(self.module, dtype, self.is_tied)
        self.fused_pass: FusedPass | None = None
        if load:
            load_folder(self.weights, self.path, is_tied=self.is_tied)
            self.cache_shapes = self._probe()
            self.is_fused = self._fuse_layers()

    @property
    def vocab_size(self) -> int:
        """Rows of the language-model head."""
        return int(self.text_config.vocab_size)

    @torch.inference_mode()
    def logits(
        self,
        tokens: list[int],
        positions: list[int] | Tensor,
        keep: Tensor | None,
        batch: Batch,
        cache: SlotCache | None,
    ) -> Tensor:
        """One forward pass over packed tokens.

        Args:
            tokens: T token ids of one or more sequences, one after another.
            positions: T, where each token stands in its sequence.
            keep: indices of the tokens whose logits are wanted, or None for all.
            batch: which token belongs to which sequence.
            cache: where keys and values are kept; a batch that keeps nothing takes None.

        Returns:
            logits [len(keep), V] in the served dtype.
        """
        self.attention.batch, self.attention.cache = batch, cache
        if self.fused_pass is not None:
            return self.fused_pass.logits(torch.as_tensor(tokens), torch.as_tensor(positions), keep)
        return self.module(
            input_ids=torch.as_tensor(tokens)[None],
            position_ids=torch.as_tensor(positions)[None],
            use_cache=False,
            logits_to_keep=0 if keep is None else keep,
        ).logits[0]

    def fused_layers(self) -> list[FusedDecoderLayer]:
        """The decoder layers that are computed by our own code; none where the model's own code runs."""
        return [module for module in self.module.modules() if isinstance(module, FusedDecoderLayer)]

    def _probe(self) -> list[KVShape]:
        """Learn what each layer keeps, from a pass over two tokens; raises if a layer does not attend through us."""
        probe, self.attention.calls = ShapeProbe(), 0
        self.logits([0, 0], [0, 1], None, probe, None)
        num_layers = int(self.text_config.num_hidden_layers)
        if sorted(probe.shapes) != list(range(num_layers)) or self.attention.calls != num_layers:
            raise ValueError(
                f"{type(self.module).__name__} has {num_layers} layers, but {self.attention.calls} of them attended "
                "through transformers' attention interface, so the embedded engine cannot keep their state. "
                "Serve this model with --rollout-engine sglang."
            )
        return [probe.shapes[layer] for layer in range(num_layers)]

    def _fuse_layers(self) -> bool:
        """Replace the decoder layers, then the pass over them, where the model computes the same; returns whether."""
        layers = getattr(self.module.get_decoder(), "layers", None)
        if not isinstance(layers, nn.ModuleList) or not all(can_be_fused(layer) for layer in layers):
            return False
        tokens = torch.randint(self.vocab_size, (len(TRIAL_POSITIONS),), generator=torch.Generator().manual_seed(0))
        originals, probe = list(layers), ShapeProbe()
        expected = self.logits(tokens.tolist(), TRIAL_POSITIONS, None, probe, None).float()

        def is_same() -> bool:
            got = self.logits(tokens.tolist(), TRIAL_POSITIONS, None, probe, None).float()
            return float((got - expected).norm() / expected.norm()) < TRIAL_TOLERANCE[self.dtype]

        for index, layer in enumerate(originals):
            layers[index] = FusedDecoderLayer(layer, self.attention, index, probe.windows[index])
        if not is_same():
            for index, layer in enumerate(originals):
                layers[index] = layer
            return False
        if can_pass(self.module):
            decoder: Any = self.module.get_decoder()
            rotary = decoder.rotary_emb
            if not any(changing_rotations(self.module)):
                decoder.rotary_emb = RotationTable(rotary)
            self.fused_pass = FusedPass(self.module, self.attention)
            if not is_same():
                self.fused_pass, decoder.rotary_emb = None, rotary
        return True


def _refuse_unserved(config: Any) -> None:
    """Raise for models whose layers keep more than keys and values."""
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ValueError(
            f"This model has layers of type {', '.join(sorted(kinds))}; the embedded engine keeps only keys and "
            "values. Serve it with --rollout-engine sglang."
        )


def _replace_layers(module: nn.Module, dtype: torch.dtype, is_tied: bool) -> ServedWeights:
    """Put our layers in; returns the memory of all weights under their HuggingFace names."""
    weights = ServedWeights(dtype)
    names = [name for name in module.state_dict() if not (is_tied and name == "lm_head.weight")]
    head = module.get_output_embeddings()  # type: ignore[operator]
    embedding = module.get_input_embeddings()  # type: ignore[operator]
    for prefix, parent in list(module.named_modules()):
        for group in _linear_groups(parent):
            linears = [getattr(parent, child) for child in group]
            paths = [f"{prefix}.{child}".lstrip(".") for child in group]
            stacked = StackedLinear(linears, dtype)
            weight_names = [f"{path}.weight" for path in paths]
            if is_tied and linears == [head]:
                weight_names = [_name_of(module, embedding.weight)]
            bias_names = [
                f"{p}.bias" if linear.bias is not None else None for p, linear in zip(paths, linears, strict=True)
            ]
            weights.add_linear(weight_names, bias_names, stacked)
            for index, child in enumerate(group):
                setattr(parent, child, stacked if index == 0 else LinearPart(stacked, index))
        for child, norm in list(parent.named_children()):
            if _is_plain_rms_norm(norm):
                setattr(parent, child, FusedRMSNorm(norm.weight, norm.variance_epsilon))  # type: ignore[arg-type]
    stacked_biases = {id(m.bias) for m in module.modules() if isinstance(m, StackedLinear)}
    for name, parameter in module.named_parameters():
        if id(parameter) not in stacked_biases:
            weights.add_parameter(dict(_checkpoint_parts(name, parameter)), parameter)
    for name, buffer in module.named_buffers():
        if name in names:
            if any(part in name for part in getattr(module, "_keep_in_fp32_modules_strict", None) or ()):
                buffer.data = buffer.data.float()
            weights.add_parameter({name: ()}, buffer)
    order = {name: index for index, name in enumerate(names)}
    weights.places = dict(sorted(weights.places.items(), key=lambda item: order.get(item[0], len(order))))
    return weights


def _linear_groups(parent: nn.Module) -> Iterator[tuple[str, ...]]:
    """The linear children of a module, those that read the same input together."""
    children = {name: child for name, child in parent.named_children() if type(child) is nn.Linear}
    for group in STACKED:
        if all(name in children for name in group) and len({children[name].in_features for name in group}) == 1:
            yield group
            for name in group:
                del children[name]
    for name in children:
        yield (name,)


def _name_of(module: nn.Module, parameter: Tensor) -> str:
    return next(name for name, candidate in module.named_parameters() if candidate is parameter)


def _checkpoint_parts(name: str, parameter: Tensor) -> Iterator[tuple[str, tuple[int | slice, ...]]]:
    """The names under which a checkpoint holds a parameter, each with its block of the parameter.

    transformers keeps the experts of a layer in two 3-D parameters, checkpoints keep each expert's matrices apart.
    """
    prefix, _, leaf = name.rpartition(".")
    if parameter.ndim != 3 or not prefix.endswith("experts") or leaf not in ("gate_up_proj", "down_proj"):
        yield name, ()
        return
    for expert in range(parameter.shape[0]):
        if leaf == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", (expert,)
            continue
        half = parameter.shape[1] // 2
        yield f"{prefix}.{expert}.gate_proj.weight", (expert, slice(0, half))
        yield f"{prefix}.{expert}.up_proj.weight", (expert, slice(half, 2 * half))


def _is_plain_rms_norm(norm: nn.Module) -> bool:
    """Whether a module is exactly x / sqrt(mean(x^2) + eps) * weight, found by trying it in fp32."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float):
        return False
    generator = torch.Generator().manual_seed(0)
    trial = copy.deepcopy(norm).float()
    trial.weight.data = torch.randn(weight.shape, generator=generator)  # type: ignore[union-attr]
    x = torch.randn(3, weight.shape[0], generator=generator)
    try:
        expected = trial(x)
    except (TypeError, RuntimeError):
        return False
    return torch.allclose(expected, FusedRMSNorm(trial.weight, eps)(x), atol=1e-6)  # type: ignore[arg-type]
