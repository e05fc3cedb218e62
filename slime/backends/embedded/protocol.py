"""SGLang's request and reply shapes: what a /generate body may hold, and the errors for what it may not.

Field names, defaults, limits and messages follow the stock server (0.5.23, tried live; see tests/contracts/engine).
Standard library only, so that the rules can be read and tested without a model.
"""

import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

SAMPLING_FIELDS = (
    "max_new_tokens",
    "stop",
    "stop_token_ids",
    "stop_regex",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "min_new_tokens",
    "n",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "no_stop_trim",
    "stream_interval",
    "logit_bias",
    "sampling_seed",
    "custom_params",
    "beam_width",
    "watermark",
    "choice",
)
"""Every field that a sampling_params object may have, in the order the stock server lists them."""

NOT_SERVED = ("stop_regex", "json_schema", "regex", "ebnf", "structural_tag", "watermark", "choice")
"""Fields of the protocol that this engine cannot honour; setting one is an error, never ignored."""
NOT_SERVED_INPUTS = ("input_embeds", "image_data", "video_data", "audio_data", "lora_path", "custom_logit_processor")
NOT_SERVED_OUTPUTS = ("return_hidden_states", "return_routed_experts", "return_sampling_mask", "return_indexer_topk")

ALL_TOKENS = 1 << 30
"""top_k that keeps the whole vocabulary."""
GREEDY_BELOW = 1e-6
MAX_STOP_STRINGS = 32


class RequestError(ValueError):
    """A request that is refused. `body` is the JSON that the client gets, `status` the HTTP status."""

    def __init__(self, message: str, *, status: int = 400, body: Any = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = body if body is not None else {"error": {"message": message}}


def contract_error(message: str) -> RequestError:
    """A body that breaks the JSON schema: the stock server puts the text straight under `error`."""
    return RequestError(message, body={"error": message})


@dataclass(frozen=True)
class SamplingParams:
    """How one request samples. temperature 0 is greedy."""

    max_new_tokens: int | None = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = ALL_TOKENS
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    n: int = 1
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    stream_interval: int = 1
    logit_bias: dict[int, float] = field(default_factory=dict)
    sampling_seed: int | None = None


@dataclass(frozen=True)
class GenerateItem:
    """One sequence to generate: a prompt (`text` or `input_ids`) and what to report about it."""

    rid: str
    text: str | None
    input_ids: list[int] | None
    sampling: SamplingParams
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    token_ids_logprob: tuple[int, ...] = ()
    return_text_in_logprobs: bool = False


@dataclass(frozen=True)
class GenerateCall:
    """One /generate call. `is_list`: the reply is a list, also of one."""

    items: list[GenerateItem]
    is_list: bool
    stream: bool


# Checks of single values, with the stock server's words


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"boolean `{'true' if value else 'false'}`"
    if isinstance(value, int):
        return f"integer `{value}`"
    if isinstance(value, float):
        return f"floating point `{value}`"
    if isinstance(value, str):
        return f'string "{value}"'
    return "sequence" if isinstance(value, list) else "map"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(value: Any, is_right: Callable[[Any], bool], expected: str) -> Any:
    if not is_right(value):
        raise contract_error(f"invalid type: {_shown(value)}, expected {expected}")
    return value


def _int(value: Any) -> int:
    return int(_check(value, _is_int, "i64"))


def _float(value: Any) -> float:
    return float(_check(value, _is_number, "f64"))


def _bool(value: Any) -> bool:
    return bool(_check(value, lambda v: isinstance(v, bool), "a boolean"))


def _strings(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    _check(value, lambda v: isinstance(v, list), "a string or a sequence of strings")
    return tuple(_check(item, lambda v: isinstance(v, str), "a string") for item in value)


def _token_set(value: Any) -> frozenset[int]:
    _check(value, lambda v: isinstance(v, list), "a sequence")
    return frozenset(_int(item) for item in value if item is not None)


def _biases(value: Any) -> dict[int, float]:
    _check(value, lambda v: isinstance(v, dict), "a map")
    try:
        return {int(token): _float(bias) for token, bias in value.items()}
    except ValueError as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"logit_bias must have token ids as keys, got {sorted(value)[0]!r}.") from error


_READERS: dict[str, Callable[[Any], Any]] = {
    "max_new_tokens": _int,
    "stop": _strings,
    "stop_token_ids": _token_set,
    "temperature": _float,
    "top_p": _float,
    "top_k": _int,
    "min_p": _float,
    "frequency_penalty": _float,
    "presence_penalty": _float,
    "repetition_penalty": _float,
    "min_new_tokens": _int,
    "n": _int,
    "ignore_eos": _bool,
    "skip_special_tokens": _bool,
    "spaces_between_special_tokens": _bool,
    "no_stop_trim": _bool,
    "stream_interval": _int,
    "logit_bias": _biases,
    "sampling_seed": _int,
}


def parse_sampling_params(value: Any, vocab_size: int) -> SamplingParams:
    """A sampling_params object; raises `RequestError` for unknown fields, wrong types and values out of range."""
    _check(value, lambda v: isinstance(v, dict), "struct SamplingParams")
    read: dict[str, Any] = {}
    for name, given in value.items():
        if name not in SAMPLING_FIELDS:
            listed = ", ".join(f"`{known}`" for known in SAMPLING_FIELDS)
            raise contract_error(f"unknown field `{name}`, expected one of {listed}")
        if given is None:
            if name == "max_new_tokens":
                read[name] = None
            continue
        if (name in NOT_SERVED and given) or (name == "beam_width" and given != 1):
            raise RequestError(
                f"The embedded engine cannot honour sampling_params.{name}={given!r}. Remove it, or serve the model "
                "with --rollout-engine sglang."
            )
        if name in _READERS:
            read[name] = _READERS[name](given)
    params = SamplingParams(**read)
    _verify(params, vocab_size)
    if params.temperature < GREEDY_BELOW:
        params = replace(params, temperature=0.0)
    if params.top_k == -1:
        params = replace(params, top_k=ALL_TOKENS)
    return params


def _verify(params: SamplingParams, vocab_size: int) -> None:
    """Raise for values out of range."""

    def refuse(message: str) -> None:
        raise RequestError(message)

    if not math.isfinite(params.temperature) or params.temperature < 0.0:
        refuse(f"temperature must be a non-negative finite number, got {params.temperature}.")
    if not 0.0 < params.top_p <= 1.0:
        refuse(f"top_p must be in (0, 1], got {params.top_p}.")
    if not 0.0 <= params.min_p <= 1.0:
        refuse(f"min_p must be in [0, 1], got {params.min_p}.")
    if params.top_k < 1 and params.top_k != -1:
        refuse(f"top_k must be -1 (disable) or at least 1, got {params.top_k}.")
    for name in ("frequency_penalty", "presence_penalty"):
        if not -2.0 <= getattr(params, name) <= 2.0:
            refuse(f"{name} must be in [-2, 2], got {getattr(params, name)}.")
    if not 0.0 < params.repetition_penalty <= 2.0:
        refuse(f"repetition_penalty must be in (0, 2] (1.0 = no penalty), got {params.repetition_penalty}.")
    if params.max_new_tokens is not None and params.max_new_tokens < 0:
        refuse(f"max_new_tokens must be at least 0, got {params.max_new_tokens}.")
    if params.min_new_tokens < 0 or (
        params.max_new_tokens is not None and params.min_new_tokens > params.max_new_tokens
    ):
        refuse(f"min_new_tokens must be in [0, max_new_tokens({params.max_new_tokens})], got {params.min_new_tokens}.")
    if params.n < 1:
        refuse(f"n must be at least 1, got {params.n}.")
    if len(params.stop) > MAX_STOP_STRINGS:
        refuse(f"at most {MAX_STOP_STRINGS} stop strings are allowed, got {len(params.stop)}")
    for token in params.logit_bias:
        if not 0 <= token < vocab_size:
            refuse(f"logit_bias must has keys in [0, {vocab_size - 1}], got {token}.")
    if params.sampling_seed is not None and not -(2**63) <= params.sampling_seed < 2**63:
        refuse(f"sampling_seed must be in [-2**63, 2**63 - 1], got {params.sampling_seed}.")


def parse_generate(body: Any, vocab_size: int) -> GenerateCall:
    """A /generate body as a list of sequences to generate; raises `RequestError` when it breaks the protocol.

    A batch with n > 1 gives the n samples of a prompt next to each other, each with an id of its own.
    """
    _check(body, lambda v: isinstance(v, dict), "struct GenerateRequest")
    for name in (*NOT_SERVED_INPUTS, *NOT_SERVED_OUTPUTS):
        if body.get(name):
            raise RequestError(
                f"The embedded engine cannot honour `{name}`. Remove it, or serve the model with "
                "--rollout-engine sglang."
            )
    texts, prompts, is_batch = _prompts(body, vocab_size)
    size = len(texts)
    given = body.get("sampling_params")
    if isinstance(given, list):
        if len(given) != size or not is_batch:
            raise RequestError(f"sampling_params has {len(given)} entries for {size} prompts.")
        sampling = [parse_sampling_params(item, vocab_size) for item in given]
    else:
        sampling = [parse_sampling_params(given if given is not None else {}, vocab_size)] * size
    n = sampling[0].n
    if any(params.n != n for params in sampling):
        raise RequestError("The parallel_sample_num should be the same for all samples in sample params.")

    def per_item(name: str, read: Callable[[Any], Any], default: Any) -> list[Any]:
        value = body.get(name)
        if not isinstance(value, list):
            return [default if value is None else read(value)] * size
        if n > 1:
            raise RequestError(f"Cannot use list {name} with parallel_sample_num > 1")
        if len(value) != size:
            raise RequestError(f"{name} has {len(value)} entries for {size} prompts.")
        return [default if item is None else read(item) for item in value]

    items = [
        GenerateItem(
            rid, text, prompt, params, logprob, start, top, token_ids, bool(body.get("return_text_in_logprobs"))
        )
        for rid, text, prompt, params, logprob, start, top, token_ids in zip(
            _rids(body.get("rid"), size, is_batch, n),
            texts,
            prompts,
            sampling,
            per_item("return_logprob", _bool, False),
            per_item("logprob_start_len", _int, -1),
            per_item("top_logprobs_num", _int, 0),
            _token_ids_logprob(body.get("token_ids_logprob"), size, n, vocab_size),
            strict=True,
        )
    ]
    if n > 1:
        items = [replace(item, rid=uuid.uuid4().hex) for item in items for _ in range(n)]
    rids = [item.rid for item in items]
    if len(set(rids)) != len(rids):
        raise RequestError(f"Duplicate request ids in one call: {sorted(r for r in set(rids) if rids.count(r) > 1)}.")
    return GenerateCall(items, is_list=is_batch or n > 1, stream=_bool(body.get("stream") or False))


def _prompts(body: dict[str, Any], vocab_size: int) -> tuple[list[str | None], list[list[int] | None], bool]:
    """(texts, token ids, whether the body holds a list of prompts)."""
    text, input_ids = body.get("text"), body.get("input_ids")
    if text is None and input_ids is None:
        raise RequestError("Either text, input_ids or input_embeds should be provided.")
    if input_ids is None:
        texts: list[str | None] = list(_strings(text))
        return texts, [None] * len(texts), isinstance(text, list)
    _check(input_ids, lambda v: isinstance(v, list), "a sequence of token ids or of lists of token ids")
    if not input_ids:
        raise RequestError("input_ids cannot be empty.")
    is_batch = isinstance(input_ids[0], list)
    prompts = input_ids if is_batch else [input_ids]
    for prompt in prompts:
        _check(prompt, lambda v: isinstance(v, list), "a sequence of token ids")
        if not prompt:
            raise RequestError("input_ids cannot be empty.")
        for token in prompt:
            if not _is_int(token):
                raise contract_error(f"invalid type: {_shown(token)}, expected i64")
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"input_ids contains out-of-vocabulary token id {token}; valid range is [0, {vocab_size})."
                )
    return [None] * len(prompts), prompts, is_batch


def _rids(rid: Any, size: int, is_batch: bool, n: int) -> list[str]:
    if rid is None:
        return [uuid.uuid4().hex for _ in range(size)]
    if isinstance(rid, str):
        return [f"{rid}_{index}" for index in range(size)] if is_batch or n > 1 else [rid]
    if not isinstance(rid, list) or not all(isinstance(item, str) for item in rid):
        raise RequestError("The rid should be a string or a list of strings.")
    if len(rid) != size:
        raise RequestError("The specified rids length mismatch with the batch_size for batch processing.")
    return rid


def _token_ids_logprob(value: Any, size: int, n: int, vocab_size: int) -> list[tuple[int, ...]]:
    if not value:
        return [()] * size
    if _is_int(value):
        value = [value]
    if isinstance(value[0], list):
        if n > 1:
            raise RequestError("Cannot use list token_ids_logprob with parallel_sample_num > 1")
        if len(value) != size:
            raise RequestError(f"token_ids_logprob has {len(value)} entries for {size} prompts.")
        lists = value
    else:
        lists = [value] * size
    for tokens in lists:
        for token in tokens:
            if not _is_int(token):
                raise RequestError("token_ids_logprob must be a flat list of integers.")
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"token_ids_logprob contains out-of-vocabulary token id {token}; valid range is [0, {vocab_size})."
                )
    return [tuple(tokens) for tokens in lists]


def resolve_length(num_prompt_tokens: int, max_new_tokens: int | None, context_length: int) -> int:
    """How many tokens a request may make; raises `RequestError` when prompt and reply do not fit the context."""
    if num_prompt_tokens >= context_length:
        raise RequestError(
            f"The input ({num_prompt_tokens} tokens) is longer than the model's context length "
            f"({context_length} tokens)."
        )
    if max_new_tokens is None:
        return context_length - num_prompt_tokens - 1
    total = num_prompt_tokens + max_new_tokens
    if total > context_length:
        raise RequestError(
            f"Requested token count exceeds the model's maximum context length of {context_length} tokens. "
            f"You requested a total of {total} tokens: {num_prompt_tokens} tokens from the input messages and "
            f"{max_new_tokens} tokens for the completion. Please reduce the number of tokens in the input messages "
            "or the completion to fit within the limit."
        )
    return max_new_tokens
