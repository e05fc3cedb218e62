"""What an engine's `meta_info` says of new response tokens: weight versions, top-p vocabularies, routed experts.

Tensors are int32 on the CPU. Nothing here changes a sample: `changes` returns the attributes to set, so that a
reply that does not fit raises before anything was touched.
"""

from argparse import Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from slime.utils.misc import decode_int32_meta_array

if TYPE_CHECKING:
    from torch import Tensor

    from slime.utils.types import Sample

_TOP_P_IDS = ("top_p_token_ids", "top_p_kept_token_ids")
_TOP_P_OFFSETS = ("top_p_token_offsets", "top_p_kept_token_offsets")


def as_list(values: Iterable[Any] | None) -> list[Any]:
    """A list of a tensor, array or iterable; None is the empty list."""
    if values is None:
        return []
    return values.tolist() if hasattr(values, "tolist") else list(values)


def weight_versions(meta_info: dict[str, Any]) -> list[str]:
    """The weight versions that made the tokens of one reply, in order: its spans, else its one version."""
    spans = meta_info.get("weight_versions") or []
    made = [str(span["version"]) for span in spans if span.get("end", 0) > span.get("start", 0)]
    if made:
        return made
    version = meta_info.get("weight_version")
    return [] if version is None else [str(version)]


SPANS = "weight_version_spans"
"""Key in `Sample.metadata` of samples with more than one version: [[version, response tokens], ...] in order."""


def version_spans(sample: "Sample") -> list[tuple[str, int, int]]:
    """(version, start, end) of stretches of the response, in order; [] where no version is known.

    Where only the versions are known and not which token is whose, all tokens count as the first one's.
    """
    if not sample.weight_versions:
        return []
    spans, start = [], 0
    for version, count in (sample.metadata or {}).get(SPANS) or [[sample.weight_versions[0], sample.response_length]]:
        end = min(start + int(count), sample.response_length)
        spans.append((str(version), start, end))
        start = end
    version, start, _ = spans[-1]
    return [*spans[:-1], (version, start, sample.response_length)]  # tokens of tools after the last reply


def note_versions(sample: "Sample", meta_info: dict[str, Any], num_new: int) -> None:
    """Add the versions that made the last `num_new` tokens; which token is whose is kept where they differ."""
    held: list[list[Any]] = [[version, end - start] for version, start, end in version_spans(sample)]
    made = _counted_versions(meta_info, num_new)
    if held:
        held[-1][1] -= num_new  # `version_spans` gave them to the last version that was known
    elif made:
        made[0][1] += sample.response_length - num_new
    sample.weight_versions = list(sample.weight_versions) + weight_versions(meta_info)
    if len(set(sample.weight_versions)) > 1:
        sample.metadata = {**(sample.metadata or {}), SPANS: [span for span in [*held, *made] if span[1] > 0]}


def _counted_versions(meta_info: dict[str, Any], num_new: int) -> list[list[Any]]:
    spans = meta_info.get("weight_versions") or []
    counted = [[str(span["version"]), int(span["end"]) - int(span["start"])] for span in spans]
    if counted:
        return counted
    version = meta_info.get("weight_version")
    return [] if version is None else [[str(version), num_new]]


def changes(
    sample: "Sample", args: Namespace | None, meta_info: dict[str, Any], new_tokens: list[int]
) -> dict[str, Any]:
    """The attributes of `sample` to set once `new_tokens` are appended.

    Raises:
        ValueError: top-p arrays or routed experts that do not fit the tokens.
    """
    return _top_p_changes(sample, meta_info, len(new_tokens)) | _routed_expert_changes(
        sample, args, meta_info, len(sample.tokens) + len(new_tokens)
    )


def _top_p_changes(sample: "Sample", meta_info: dict[str, Any], num_new: int) -> dict[str, Any]:
    if sample.rollout_top_p_token_offsets is None and not any(k in meta_info for k in _TOP_P_IDS + _TOP_P_OFFSETS):
        return {}
    import torch  # only runs with top-p pay for it

    ids = decode_int32_meta_array(meta_info, _TOP_P_IDS)
    offsets = decode_int32_meta_array(meta_info, _TOP_P_OFFSETS)
    if (ids is None) != (offsets is None):
        raise ValueError("A reply with top-p token ids needs their offsets too, and the other way round.")
    held = _held_top_p(sample)
    if ids is None or offsets is None:
        if held is None or num_new == 0:
            return {}
        held_offsets = held[1]
        padding = held_offsets[-1:].expand(num_new)
        return {"rollout_top_p_token_offsets": torch.cat([held_offsets, padding])}
    if len(offsets) != num_new + 1 or int(offsets[0]) != 0 or int(offsets[-1]) != len(ids):
        seen = f"{len(offsets)}, from {int(offsets[0])} to {int(offsets[-1])}" if len(offsets) else "none"
        raise ValueError(
            f"The reply's top-p offsets do not fit: {num_new} new tokens need {num_new + 1} offsets from 0 to "
            f"{len(ids)} (the number of ids); seen were {seen}."
        )
    if held is None:
        if sample.response_length:
            raise ValueError(
                f"The reply brings top-p tokens, but the {sample.response_length} response tokens before it have none."
            )
        return {"rollout_top_p_token_ids": ids, "rollout_top_p_token_offsets": offsets}
    held_ids, held_offsets = held
    return {
        "rollout_top_p_token_ids": torch.cat([held_ids, ids]),
        "rollout_top_p_token_offsets": torch.cat([held_offsets, offsets[1:] + held_offsets[-1]]),
    }


def _held_top_p(sample: "Sample") -> "tuple[Tensor, Tensor] | None":
    if sample.rollout_top_p_token_offsets is None:
        return None
    import torch

    ids = torch.as_tensor(sample.rollout_top_p_token_ids, dtype=torch.int32)
    offsets = torch.as_tensor(sample.rollout_top_p_token_offsets, dtype=torch.int32)
    if len(offsets) != sample.response_length + 1 or int(offsets[-1]) != len(ids):
        raise ValueError(
            f"rollout_top_p_token_offsets has {len(offsets)} entries ending at {int(offsets[-1])}; a response of "
            f"{sample.response_length} tokens with {len(ids)} ids needs {sample.response_length + 1} ending there."
        )
    return ids, offsets


def _routed_expert_changes(
    sample: "Sample", args: Namespace | None, meta_info: dict[str, Any], num_tokens: int
) -> dict[str, Any]:
    flat = decode_int32_meta_array(meta_info, ("routed_experts",))
    if flat is None:
        return {}
    import torch

    if args is None:
        raise ValueError("Routed experts need args (num_layers, moe_router_topk): pass args to append_response_tokens.")
    start = int(meta_info.get("routed_experts_start_len") or 0)
    if start < 0:
        raise ValueError(f"routed_experts_start_len is {start}; it counts tokens and cannot be negative.")
    rows = num_tokens - 1 - start
    shape = (rows, int(args.num_layers), int(args.moe_router_topk))
    if rows < 0 or flat.numel() != shape[0] * shape[1] * shape[2]:
        raise ValueError(
            f"The reply has {flat.numel()} routed experts; {num_tokens} tokens from {start} on need "
            f"{rows} x {shape[1]} layers x top {shape[2]}."
        )
    new = flat.reshape(shape)
    if start == 0:
        return {"rollout_routed_experts": new}
    if sample.rollout_routed_experts is None:
        raise ValueError(f"The reply's routed experts start at token {start}, but the sample has none before it.")
    held = torch.as_tensor(sample.rollout_routed_experts, dtype=torch.int32)
    if len(held) < start:
        raise ValueError(
            f"The reply's routed experts start at token {start}, but the sample has only {len(held)} rows."
        )
    return {"rollout_routed_experts": torch.cat([held[:start], new])}
