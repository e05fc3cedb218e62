"""A sample as a request to an engine, and an engine's reply as the sample's next tokens."""

import uuid
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from slime.rollout.sampling import session_id
from slime.utils.direct_requests import ROUTING_KEY
from slime.utils.processing_utils import build_processor_kwargs, encode_image_for_rollout_engine
from slime.utils.types import Sample


@dataclass(frozen=True)
class EngineRequest:
    """What is sent to `/generate`."""

    payload: dict[str, Any]
    headers: dict[str, str] | None


def prepare_request(
    args: Namespace, sample: Sample, sampling_params: dict[str, Any], tokenizer: Any, processor: Any
) -> EngineRequest | None:
    """The request that continues `sample`, which gets its prompt's tokens if it has none yet.

    Returns:
        None when the response is as long as it may be; the sample is then TRUNCATED.
    """
    assert sample.status in (Sample.Status.PENDING, Sample.Status.ABORTED), f"Sample {sample.index} is {sample.status}."
    prompt_ids = _prepare_prompt_ids(sample, tokenizer, processor)
    if not sample.tokens:
        sample.tokens = list(prompt_ids)
    params = dict(sampling_params)
    params["max_new_tokens"] = _tokens_left(args, sample, params.get("max_new_tokens"))
    if params["max_new_tokens"] == 0:
        sample.status = Sample.Status.TRUNCATED
        return None
    payload: dict[str, Any] = {"sampling_params": params, "return_logprob": True}
    if getattr(args, "rollout_engine", None) == "embedded":
        # A retry so ends the request that it repeats. SGLang would refuse an id that is still in flight.
        payload["rid"] = uuid.uuid4().hex
    if getattr(args, "use_rollout_routing_replay", False):
        payload["return_routed_experts"] = True
    images = (sample.multimodal_inputs or {}).get("images")
    if images:
        payload["text"] = f"{sample.prompt}{sample.response}"
        payload["image_data"] = [encode_image_for_rollout_engine(image) for image in images]
    else:
        payload["input_ids"] = prompt_ids
    return EngineRequest(payload, _routing_headers(args, sample))


def _prepare_prompt_ids(sample: Sample, tokenizer: Any, processor: Any) -> list[int]:
    """The tokens that the engine continues: the prompt's, or all of a response that was begun before.

    A processor's further outputs are kept in `sample.multimodal_train_inputs` for the trainer.
    """
    if sample.tokens and sample.response_length:
        return sample.tokens
    if sample.multimodal_inputs and processor is not None:
        output = processor(text=sample.prompt, **build_processor_kwargs(sample.multimodal_inputs))
        rest = {key: value for key, value in output.items() if key not in ("input_ids", "attention_mask")}
        sample.multimodal_train_inputs = rest or None
        return [int(token) for token in output["input_ids"][0]]
    if sample.tokens:
        return sample.tokens
    if not isinstance(sample.prompt, str):
        raise ValueError(
            f"The prompt of sample {sample.index} is a list of messages, which the engine cannot read. "
            "Add --apply-chat-template, or use a --custom-generate-function-path that takes messages."
        )
    return _encode(sample.prompt, tokenizer)


_latest: tuple[Any, str, list[int]] | None = None


def _encode(prompt: str, tokenizer: Any) -> list[int]:
    """Tokens of a prompt; the samples of a group come one after another, and only the first costs anything."""
    global _latest
    known = _latest
    if known is None or known[0] is not tokenizer or known[1] != prompt:
        _latest = known = (tokenizer, prompt, list(tokenizer.encode(prompt, add_special_tokens=False)))
    return list(known[2])


def _tokens_left(args: Namespace, sample: Sample, max_new_tokens: int | None) -> int:
    """Tokens that the response may still grow by, 0 or more."""
    if max_new_tokens is None:
        raise ValueError("How long may a response be? Give --rollout-max-response-len (tokens).")
    left = max_new_tokens - sample.response_length
    assert left >= 0, (
        f"The response of sample {sample.index} has {sample.response_length} tokens, more than max_new_tokens "
        f"{max_new_tokens}."
    )
    context = getattr(args, "rollout_max_context_len", None)
    return left if context is None else max(0, min(left, context - len(sample.tokens)))


def _routing_headers(args: Namespace, sample: Sample) -> dict[str, str] | None:
    if getattr(args, "router_policy", None) != "consistent_hashing":
        return None
    if sample.session_id is None:
        sample.session_id = session_id(args, sample)
    return {ROUTING_KEY: sample.session_id}


def take_reply(args: Namespace, sample: Sample, reply: Any, version_before: str | None = None) -> None:
    """Append an engine's reply to `sample`.

    Args:
        version_before: the version that engines held when the request went out. An engine that tells only the version
            that ended the reply may have begun it with this one, so then all its tokens count as made by it.

    Raises:
        ValueError: it is no reply of `/generate`, or its log-probs and tokens are not as many.
    """
    meta_info = reply.get("meta_info") if isinstance(reply, dict) else None
    if not isinstance(meta_info, dict) or "finish_reason" not in meta_info:
        raise ValueError(f"The engine answered sample {sample.index} with {str(reply)[:500]!r}, not with a generation.")
    token_log_probs = meta_info.get("output_token_logprobs") or []
    log_probs = [entry[0] for entry in token_log_probs]
    tokens = [entry[1] for entry in token_log_probs]
    _check_counts(sample, reply, meta_info, tokens)
    if version_before not in (None, str(meta_info.get("weight_version"))) and "weight_versions" not in meta_info:
        spans = [{"version": version_before, "start": 0, "end": len(tokens)}]
        meta_info = {**meta_info, "weight_versions": spans}
    sample.append_response_tokens(
        args, tokens=tokens, log_probs=log_probs, meta_info=meta_info, text=reply.get("text", "")
    )


def _check_counts(sample: Sample, reply: dict[str, Any], meta_info: dict[str, Any], tokens: list[int]) -> None:
    request = f"request {meta_info.get('id', '(without id)')} (sample {sample.index})"
    completed = meta_info.get("completion_tokens")
    if completed is not None and completed != len(tokens):
        raise ValueError(
            f"{request}: the reply has {completed} completion tokens and log-probs of {len(tokens)}. "
            "Training needs one log-prob per token."
        )
    output_ids = reply.get("output_ids")
    if output_ids is not None and list(output_ids) != tokens:
        raise ValueError(
            f"{request}: output_ids ({len(output_ids)} tokens) and output_token_logprobs ({len(tokens)} tokens) are "
            "not of the same tokens."
        )
