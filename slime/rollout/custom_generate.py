"""Calls users' generate functions in either of their forms, and gives tokens to samples that come back as text only.

The per-sample form is `async fn(args, sample, sampling_params[, evaluation])`, the list form
`async fn(args, samples[, sampling_params][, evaluation])`; the name of the second parameter tells them apart.
"""

import copy
import inspect
import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from slime.utils.types import Sample

logger = logging.getLogger(__name__)

RETOKENIZED = "retokenized"
"""Key in `Sample.metadata` of samples whose tokens were made from text here."""
_has_warned = False

Message = dict[str, Any]
Piece = tuple[str, int]
"""Text of a response and whether it is trained (1) or was inserted by a tool (0)."""


async def call_generate_function(
    function: Callable[..., Any],
    args: Namespace,
    sample: Sample,
    sampling_params: dict[str, Any],
    *,
    evaluation: bool,
    tokenizer: Any,
) -> Sample | list[Any]:
    """One call of a user's generate function for one sample.

    The list form gets a list of this one sample, so that samples are made side by side.

    Args:
        tokenizer: for samples that come back without tokens; None leaves them as they are.

    Raises:
        TypeError: it returned something else than samples.
    """
    parameters = list(inspect.signature(function).parameters)
    is_list_form = len(parameters) > 1 and parameters[1] == "samples"
    kwargs: dict[str, Any] = {"evaluation": evaluation} if "evaluation" in parameters else {}
    prompt = copy.deepcopy(sample.prompt)
    if is_list_form:
        if "sampling_params" in parameters:
            kwargs["sampling_params"] = sampling_params
        samples = [sample]
        result = await function(args, samples, **kwargs)
        result = samples if result is None else result
        result = result[0] if isinstance(result, list) and len(result) == 1 else result
    else:
        result = await function(args, sample, sampling_params, **kwargs)
    for made in _leaves(result, function):
        if tokenizer is not None and _needs_tokens(made):
            retokenize(args, made, prompt, tokenizer)
    return result  # type: ignore[no-any-return]


def _leaves(result: Any, function: Callable[..., Any]) -> list[Sample]:
    if isinstance(result, Sample):
        return [result]
    if isinstance(result, list) and result:
        return [sample for item in result for sample in _leaves(item, function)]
    name = getattr(function, "__qualname__", repr(function))
    raise TypeError(f"The generate function {name} returned {result!r}; it must return a Sample or a list of them.")


def _needs_tokens(sample: Sample) -> bool:
    if sample.status == Sample.Status.ABORTED or sample.response_length:
        return False
    return bool(sample.response) or not sample.tokens


def retokenize(args: Namespace, sample: Sample, prompt: str | list[Message], tokenizer: Any) -> None:
    """Give a sample that has only text its tokens, in place; the trainer then computes the log-probs itself.

    Args:
        prompt: as it was before the generate function ran. Where that is a list of messages to which the function
            appended others, the assistant's are trained and all others (tool results) are masked.
    """
    if isinstance(prompt, str):
        prompt_text, pieces = prompt, [(sample.response, 1)]
    else:
        prompt_text, pieces = _conversation_pieces(args, sample, prompt, tokenizer)
    tokens = list(tokenizer.encode(prompt_text, add_special_tokens=False))
    num_prompt_tokens = len(tokens)
    mask: list[int] = []
    for text, is_trained in pieces:
        ids = list(tokenizer.encode(text, add_special_tokens=False)) if text else []
        tokens += ids
        mask += [is_trained] * len(ids)
    sample.prompt = prompt
    sample.tokens = tokens
    sample.response_length = len(tokens) - num_prompt_tokens
    sample.loss_mask = mask
    sample.rollout_log_probs = None
    sample.metadata[RETOKENIZED] = True
    if sample.status == Sample.Status.PENDING:
        sample.status = Sample.Status.COMPLETED
    _warn_once()


def _conversation_pieces(
    args: Namespace, sample: Sample, prompt: list[Message], tokenizer: Any
) -> tuple[str, list[Piece]]:
    """The prompt's text and the response in pieces, from the messages that the function appended to the prompt."""

    def render(messages: list[Message], add_generation_prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=sample.metadata.get("tools"),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(getattr(args, "apply_chat_template_kwargs", None) or {}),
            )
        )

    prompt_text = render(prompt, True)
    appended = sample.prompt[len(prompt) :] if sample.prompt[: len(prompt)] == prompt else []
    turns: list[Message] = [turn for turn in appended if isinstance(turn, dict)]
    if sample.response and not (turns and _is_answer(turns[-1], sample.response)):
        turns.append({"role": "assistant", "content": sample.response})
    pieces = _rendered_pieces(render, prompt, prompt_text, turns)
    return prompt_text, [(sample.response, 1)] if pieces is None else pieces


def _is_answer(turn: Message, response: str) -> bool:
    return turn.get("role") == "assistant" and turn.get("content") == response


def _rendered_pieces(
    render: Callable[[list[Message], bool], str], prompt: list[Message], prompt_text: str, turns: list[Message]
) -> list[Piece] | None:
    """What each turn adds to the rendered text; None when the template rewrites what came before."""
    pieces: list[Piece] = []
    text = prompt_text
    for i, turn in enumerate(turns):
        if turn.get("role") != "assistant":
            continue
        before = render(prompt + turns[:i], True)
        after = render(prompt + turns[: i + 1], False)
        if not before.startswith(text) or not after.startswith(before):
            return None
        answer = after[len(before) :].rstrip()  # what follows the end-of-turn mark is the template's
        pieces += [(before[len(text) :], 0), (answer, 1)]
        text = before + answer
    return [piece for piece in pieces if piece[0]]


def _warn_once() -> None:
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    logger.warning(
        "The generate function returns text without tokens: it is tokenised again, which may not give the tokens that "
        "were sampled, and there are no rollout log-probs. rollout/retokenized counts such samples. Fill "
        "sample.append_response_tokens(...) from the engine's reply to train on the very tokens."
    )
