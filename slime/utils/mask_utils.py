"""Conversations as tokens and a loss mask: what assistants said is trained, what others said is not.

Templates differ in how they treat a message among others, so there is one way for each kind of them:

qwen          each message is rendered alone; a default system message that the template adds is cut off
qwen3         each message is rendered behind a made-up user message, consecutive tool results together
qwen3_5       all is rendered once; the assistants' spans are found in the text
distill_qwen  the first message is the prompt, the last one the response
"""

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

Message = dict[str, Any]
Masked = tuple[list[int], list[int]]
"""Token ids [T] and loss mask [T], 1 where trained."""

_MARK = "FOR CALCULATING LOSS MASK ONLY"
_DISTILL_TOKEN = "<｜Assistant｜>"
_ASSISTANT_SPAN = re.compile(r"<\|im_start\|>assistant\n(?:<think>\n)?(?P<said>.*?<\|im_end\|>\n?)", re.DOTALL)


class MultiTurnLossMaskGenerator:
    """Makes tokens and loss masks of conversations with one tokenizer."""

    def __init__(self, tokenizer: Any, tokenizer_type: str = "qwen") -> None:
        """
        Args:
            tokenizer_type: `qwen`, `qwen3`, `qwen3_5` or `distill_qwen`; `qwen` with a tokenizer of the DeepSeek-R1
                distilled kind means `distill_qwen`.
        """
        ways: dict[str, Callable[[list[Message], Any], Masked]] = {
            "qwen": self._mask_message_by_message,
            "qwen3": self._mask_behind_a_user,
            "qwen3_5": self._mask_spans,
            "distill_qwen": self._mask_last,
        }
        if tokenizer_type not in ways:
            raise ValueError(f"--loss-mask-type {tokenizer_type!r} is not one of {', '.join(ways)}.")
        if tokenizer_type == "qwen" and _DISTILL_TOKEN in tokenizer.get_added_vocab():
            tokenizer_type = "distill_qwen"
        self.tokenizer = tokenizer
        self.tokenizer_type = tokenizer_type
        self._mask = ways[tokenizer_type]
        self._system_prefix, self._num_generation_tokens = "", 0
        if tokenizer_type in ("qwen", "qwen3"):
            self._system_prefix, self._num_generation_tokens = self._measure_template()

    def get_loss_mask(self, messages: list[Message], tools: Any = None) -> Masked:
        """Token ids and loss mask of a conversation; `step_loss_mask: 0` in a message leaves it out of the loss."""
        return self._mask(messages, tools)

    def get_loss_mask_with_multimodal_alignment(
        self, messages: list[Message], input_ids: Sequence[int], tools: Any = None
    ) -> Masked:
        """The mask for `input_ids`, which a processor made longer than the text by putting images in the prompt.

        Raises:
            ValueError: they are shorter than the text.
        """
        _, mask = self.get_loss_mask([_text_only(message) for message in messages], tools)
        num_extra = len(input_ids) - len(mask)
        if num_extra < 0:
            raise ValueError(
                f"The conversation's text has {len(mask)} tokens, the processor's output {len(input_ids)}."
            )
        return list(input_ids), [0] * num_extra + mask

    def get_response_lengths(self, loss_masks: Sequence[Sequence[int]]) -> list[int]:
        return get_response_lengths(loss_masks)

    def get_text_from_loss_mask(self, token_ids: Sequence[int], loss_mask: Sequence[int]) -> list[str]:
        """What is trained, one text per run of trained tokens."""
        runs = groupby(zip(token_ids, loss_mask, strict=True), key=lambda pair: pair[1])
        return [str(self.tokenizer.decode([token for token, _ in run])) for is_trained, run in runs if is_trained]

    # ---- rendering ----

    def _render(self, messages: list[Message], tools: Any = None, add_generation_prompt: bool = False) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _measure_template(self) -> tuple[str, int]:
        """The system text that the template puts before a first user message, and the tokens that open an answer."""
        user = {"role": "user", "content": _MARK}
        text = self._render([user, user])
        first, second = (match.start() for match in re.finditer(re.escape(_MARK), text))
        num_tail = len(text) - second - len(_MARK)
        num_head = second - first - len(_MARK) - num_tail
        opening = self._render([user, user], add_generation_prompt=True)[len(text) :]
        return text[: first - num_head], len(self._encode(opening))

    def _join(self, parts: list[tuple[Message, str]]) -> Masked:
        """Encode messages rendered one by one, and mask all but what assistants said."""
        token_ids: list[int] = []
        mask: list[int] = []
        for message, text in parts:
            ids = self._encode(text)
            token_ids += ids
            if message["role"] == "assistant" and _is_trained(message):
                opening = min(self._num_generation_tokens, len(ids))
                mask += [0] * opening + [1] * (len(ids) - opening)
            else:
                mask += [0] * len(ids)
        return token_ids, mask

    # ---- one way for each kind of template ----

    def _mask_message_by_message(self, messages: list[Message], tools: Any) -> Masked:
        parts = []
        for i, message in enumerate(messages):
            text = self._render([message], tools=tools if i == 0 else None)
            if i > 0 and message["role"] != "system":
                text = text.removeprefix(self._system_prefix)
            parts.append((message, text))
        return self._join(parts)

    def _mask_behind_a_user(self, messages: list[Message], tools: Any) -> Masked:
        user = {"role": "user", "content": _MARK}
        before = self._render([user])
        parts = []
        for i, turn in enumerate(_turns(messages)):
            if i == 0:
                text = self._render([*turn, user], tools=tools)
                text = text.removesuffix(before.removeprefix(self._system_prefix))
            else:
                text = self._render([user, *turn])[len(before) :]
            parts.append((turn[0], text))
        return self._join(parts)

    def _mask_spans(self, messages: list[Message], tools: Any) -> Masked:
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError("--loss-mask-type qwen3_5 needs a fast tokenizer, one that tells where each token stands.")
        text = self._render(messages, tools=tools)
        spans = [match.span("said") for match in _ASSISTANT_SPAN.finditer(text)]
        answers = [message for message in messages if message["role"] == "assistant"]
        if len(spans) != len(answers):
            raise ValueError(
                f"The chat template renders {len(spans)} assistant turns of {len(answers)}; --loss-mask-type qwen3_5 "
                "needs <|im_start|>assistant ... <|im_end|> around each."
            )
        trained = [span for span, message in zip(spans, answers, strict=True) if _is_trained(message)]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [
            int(any(start >= first and end <= last and end > start for first, last in trained))
            for start, end in encoded["offset_mapping"]
        ]
        return list(encoded["input_ids"]), mask

    def _mask_last(self, messages: list[Message], tools: Any) -> Masked:
        prompt = self._encode(self._render(messages[:1], tools=tools, add_generation_prompt=True))
        response = self._encode(messages[-1]["content"])
        return prompt + response, [0] * len(prompt) + [int(_is_trained(messages[-1]))] * len(response)


def get_response_lengths(loss_masks: Sequence[Sequence[int]]) -> list[int]:
    """Tokens from the first trained one to the end; 0 where none is trained."""
    return [len(mask) - list(mask).index(1) if 1 in mask else 0 for mask in loss_masks]


def _is_trained(message: Message) -> bool:
    return bool(message.get("step_loss_mask", 1) == 1)


def _turns(messages: list[Message]) -> list[list[Message]]:
    """Messages one by one, but consecutive tool results together."""
    turns: list[list[Message]] = []
    for message in messages:
        if message["role"] == "tool" and turns and turns[-1][0]["role"] == "tool":
            turns[-1].append(message)
        else:
            turns.append([message])
    return turns


def _text_only(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(item.get("text", "") for item in content if item.get("type") == "text")}
