"""The types that move between rooms: `Sample`, one response with all that is known of it, and a few small ones.

Letters: P prompt tokens, R response tokens; `tokens` holds P + R, everything "per response token" holds R.
"""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, TypeAlias

from slime.utils import response_meta

RolloutBatch: TypeAlias = dict[str, Any]
"""What a trainer rank gets of one rollout: lists with one entry per sample, under the names of the data room."""


@dataclass
class Sample:
    """One prompt and the response to it. Plain and mutable: generate functions and hooks fill it in."""

    class Status(Enum):
        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    @dataclass
    class SpecInfo:
        """Counters of speculative decoding, summed over the calls that made the response."""

        spec_accept_token_num: int = 0
        spec_draft_token_num: int = 0
        spec_verify_ct: int = 0
        completion_token_num: int = 0

        @property
        def spec_accept_rate(self) -> float:
            """Accepted share of the drafted tokens; 0 when nothing was drafted."""
            return self.spec_accept_token_num / self.spec_draft_token_num if self.spec_draft_token_num else 0.0

        @property
        def spec_accept_length(self) -> float:
            """Tokens per verification step; 0 when there was none."""
            return self.completion_token_num / self.spec_verify_ct if self.spec_verify_ct else 0.0

        def add(self, meta_info: dict[str, Any]) -> None:
            self.spec_accept_token_num += meta_info.get("spec_accept_token_num", 0)
            self.spec_draft_token_num += meta_info.get("spec_draft_token_num", 0)
            self.spec_verify_ct += meta_info.get("spec_verify_ct", 0)
            self.completion_token_num += meta_info.get("completion_tokens", 0)

        def to_dict(self) -> dict[str, int]:
            return dict(self.__dict__)

        @staticmethod
        def from_dict(data: dict[str, int]) -> "Sample.SpecInfo":
            return Sample.SpecInfo(**data)

    @dataclass
    class PrefixCacheInfo:
        """How many prompt tokens the engine had in its cache, summed over the calls that made the response."""

        cached_tokens: int = 0
        total_prompt_tokens: int = 0

        @property
        def prefix_cache_hit_rate(self) -> float:
            return self.cached_tokens / self.total_prompt_tokens if self.total_prompt_tokens else 0.0

        def add(self, meta_info: dict[str, Any]) -> None:
            self.cached_tokens += meta_info.get("cached_tokens", 0)
            self.total_prompt_tokens += meta_info.get("prompt_tokens", 0)

        def to_dict(self) -> dict[str, int]:
            return dict(self.__dict__)

        @staticmethod
        def from_dict(data: dict[str, int]) -> "Sample.PrefixCacheInfo":
            return Sample.PrefixCacheInfo(**data)

    group_index: int | None = None  # which prompt, counted by the data source
    index: int | None = None  # which sample, counted by the data source
    rollout_id: int | None = None  # siblings made by one call share it; None: one of its own
    prompt: str | list[dict[str, Any]] = ""
    tokens: list[int] = field(default_factory=list)  # [P + R]
    multimodal_inputs: dict[str, Any] | None = None  # {"images": [PIL image], "videos": ...}
    multimodal_train_inputs: dict[str, Any] | None = None  # what the processor made of them
    multimodal_train_input_id: str | None = None
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    response: str = ""
    response_length: int = 0  # R
    label: Any = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None  # [R]; None: all trained
    weight_versions: list[str] = field(default_factory=list)  # of each call, in order
    rollout_log_probs: list[float] | None = None  # [R] nats, as the engine sampled them
    rollout_top_p_token_ids: Any = None  # ragged: the vocabulary kept by top-p, int32
    rollout_top_p_token_offsets: Any = None  # [R + 1], starts at 0, int32
    rollout_routed_experts: Any = None  # [P + R - 1, layers, top-k] int32
    remove_sample: bool = False  # leave out of the loss, keep in the normalization
    teacher_log_probs: Any = None  # [R] nats
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    generate_function_path: str | None = None  # wins over --custom-generate-function-path
    custom_rm_path: str | None = None  # wins over --custom-rm-path
    train_metadata: dict[str, Any] | None = None
    session_id: str | None = None  # routing key
    non_generation_time: float = 0.0  # seconds spent in tools and environments
    spec_info: SpecInfo = field(default_factory=SpecInfo)
    prefix_cache_info: PrefixCacheInfo = field(default_factory=PrefixCacheInfo)

    def to_dict(self) -> dict[str, Any]:
        """A shallow copy as plain data, attributes set from outside included."""
        data = dict(self.__dict__)
        data["status"] = self.status.value
        data["spec_info"] = self.spec_info.to_dict()
        data["prefix_cache_info"] = self.prefix_cache_info.to_dict()
        return data

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Sample":
        """The inverse of `to_dict`; unknown keys become attributes, `data` is not changed."""
        known = {f.name for f in fields(Sample)}
        values = {name: value for name, value in data.items() if name in known}
        values["status"] = Sample.Status(data.get("status", "pending"))
        values["spec_info"] = Sample.SpecInfo.from_dict(data.get("spec_info") or {})
        values["prefix_cache_info"] = Sample.PrefixCacheInfo.from_dict(data.get("prefix_cache_info") or {})
        sample = Sample(**values)
        for name, value in data.items():
            if name not in known:
                setattr(sample, name, value)
        return sample

    def get_reward_value(self, args: Namespace) -> Any:
        """The reward that trains: `reward`, or its entry `--reward-key` when that is given."""
        key = getattr(args, "reward_key", None)
        if not key:
            return self.reward
        if not isinstance(self.reward, dict) or key not in self.reward:
            raise ValueError(
                f"Sample {self.index} has the reward {self.reward!r}, in which there is no --reward-key {key!r}. "
                "Let the reward function return a dict with that key, or drop --reward-key."
            )
        return self.reward[key]

    @property
    def effective_response_length(self) -> int:
        """Trained response tokens."""
        return sum(self.loss_mask) if self.loss_mask is not None else self.response_length

    def append_response_tokens(
        self,
        args: Namespace | None = None,
        *,
        tokens: Iterable[Any] | None = None,
        log_probs: Iterable[Any] | None = None,
        trainable: bool = True,
        meta_info: dict[str, Any] | None = None,
        text: str | None = None,
        update_terminal_info: bool = True,
    ) -> None:
        """Add tokens to the response and keep everything that runs along with it in step.

        Args:
            args: needed for routed experts (num_layers, moe_router_topk) and speculative decoding.
            tokens: [n] ids, tensor or iterable.
            log_probs: [n] nats of the sampled tokens; required for trainable tokens, refused for others
                (tool output, which gets 0.0). `[]` with no tokens only initialises `rollout_log_probs`.
            trainable: whether the tokens enter the loss.
            meta_info: of the engine's reply.
            text: appended to `response`.
            update_terminal_info: take status, weight version and counters from `meta_info`.

        Raises:
            ValueError: lengths that disagree. The sample is then unchanged.
        """
        new_tokens = [int(token) for token in response_meta.as_list(tokens)]
        new_log_probs = None if log_probs is None else [float(value) for value in response_meta.as_list(log_probs)]
        self._check_append(new_tokens, new_log_probs, trainable)
        changes = response_meta.changes(self, args, meta_info or {}, new_tokens)

        old_length, n = self.response_length, len(new_tokens)
        self.response += text or ""
        self.tokens = list(self.tokens) + new_tokens
        self.response_length += n
        if n:
            mask = [1] * old_length if self.loss_mask is None else list(self.loss_mask)
            self.loss_mask = mask + [int(trainable)] * n
        if n or new_log_probs is not None:
            held = [0.0] * old_length if self.rollout_log_probs is None else list(self.rollout_log_probs)
            self.rollout_log_probs = held + (new_log_probs if trainable and new_log_probs else [0.0] * n)
        for name, value in changes.items():
            setattr(self, name, value)
        if update_terminal_info and meta_info and "finish_reason" in meta_info:
            self._take_terminal_info(args, meta_info, n)

    def _check_append(self, tokens: list[int], log_probs: list[float] | None, trainable: bool) -> None:
        for name in ("loss_mask", "rollout_log_probs"):
            value = getattr(self, name)
            if value is not None and len(value) != self.response_length:
                raise ValueError(f"{name} has {len(value)} entries for a response of {self.response_length} tokens.")
        if log_probs is not None and len(log_probs) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens came with {len(log_probs)} log-probs; they must be as many.")
        if not trainable:
            if log_probs is not None:
                raise ValueError("Tokens that are not trained have no log-probs: leave log_probs out.")
            return
        if tokens and log_probs is None:
            raise ValueError("Trained tokens need the log-probs they were sampled with.")
        if tokens and self.response_length and self.rollout_log_probs is None:
            raise ValueError(
                f"The response has {self.response_length} tokens without rollout_log_probs; trained tokens cannot "
                "follow. Append all tokens with append_response_tokens, or set rollout_log_probs first."
            )

    def _take_terminal_info(self, args: Namespace | None, meta_info: dict[str, Any], num_new: int) -> None:
        if args is not None and getattr(args, "sglang_speculative_algorithm", None):
            self.spec_info.add(meta_info)
        self.prefix_cache_info.add(meta_info)
        response_meta.note_versions(self, meta_info, num_new)
        kind = (meta_info["finish_reason"] or {}).get("type")
        by_finish = {
            "length": Sample.Status.TRUNCATED,
            "abort": Sample.Status.ABORTED,
            "stop": Sample.Status.COMPLETED,
        }
        self.status = by_finish.get(str(kind), self.status)


@dataclass(frozen=True)
class ParamInfo:
    """A parameter of the trainer as others see it."""

    name: str
    dtype: Any
    shape: Any
    attrs: dict[str, Any]
    size: int  # bytes
    src_rank: int


@dataclass(frozen=True)
class MultimodalType:
    """One kind of input besides text, and the mark that stands for it in a prompt."""

    name: str
    placeholder: str


class MultimodalTypes:
    """The kinds of input that a prompt may hold besides text."""

    IMAGE = MultimodalType("image", "<image>")
    VIDEO = MultimodalType("video", "<video>")
    AUDIO = MultimodalType("audio", "<audio>")

    @classmethod
    def all(cls) -> list[MultimodalType]:
        return [cls.IMAGE, cls.VIDEO, cls.AUDIO]

    @classmethod
    def get(cls, name: str) -> MultimodalType | None:
        """The kind called `name`, None when there is none."""
        return next((kind for kind in cls.all() if kind.name == name), None)
