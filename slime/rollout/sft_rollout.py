"""Supervised fine-tuning as a rollout: conversations become tokens and loss masks, nothing is generated.

Use it with `--rollout-function-path slime.rollout.sft_rollout.generate_rollout --loss-type sft_loss`.
"""

import logging
from argparse import Namespace
from typing import Any

from slime.utils.mask_utils import MultiTurnLossMaskGenerator
from slime.utils.misc import SingletonMeta
from slime.utils.processing_utils import load_tokenizer
from slime.utils.types import Sample

logger = logging.getLogger(__name__)


class _MaskState(metaclass=SingletonMeta):
    """The tokenizer and the masks made with it; one a process."""

    def __init__(self, args: Namespace) -> None:
        self.tokenizer = load_tokenizer(args.hf_checkpoint, trust_remote_code=getattr(args, "trust_remote_code", False))
        self.masks = MultiTurnLossMaskGenerator(self.tokenizer, tokenizer_type=args.loss_mask_type)


def generate_rollout(
    args: Namespace, rollout_id: int, data_buffer: Any, evaluation: bool = False
) -> list[list[Sample]]:
    """`--rollout-batch-size` conversations as samples, groups of one.

    The prompt of each is a list of messages (`--input-key messages`, no chat template); what the mask trains first
    begins the response.

    Raises:
        ValueError: a prompt that is no list of messages, or a conversation in which nothing is trained.
    """
    assert not evaluation, "Supervised fine-tuning generates nothing to evaluate; leave --eval-interval out."
    assert args.n_samples_per_prompt == 1, (
        "Supervised fine-tuning takes each conversation once: --n-samples-per-prompt 1."
    )
    masks = _MaskState(args).masks
    groups: list[list[Sample]] = data_buffer.get_samples(args.rollout_batch_size)
    for group in groups:
        (sample,) = group
        _fill(sample, masks)
    return groups


def _fill(sample: Sample, masks: MultiTurnLossMaskGenerator) -> None:
    messages = sample.prompt
    if not isinstance(messages, list):
        raise ValueError(
            f"The prompt of sample {sample.index} is text; supervised fine-tuning needs the list of messages. "
            "Point --input-key at it and leave --apply-chat-template out."
        )
    token_ids, loss_mask = masks.get_loss_mask(messages, tools=sample.metadata.get("tools"))
    response_length = masks.get_response_lengths([loss_mask])[0]
    if response_length == 0:
        raise ValueError(
            f"Nothing is trained in the conversation of sample {sample.index}: it has no assistant message."
        )
    sample.tokens = token_ids
    sample.response_length = response_length
    sample.loss_mask = loss_mask[-response_length:]
    sample.reward = 0
    sample.status = Sample.Status.COMPLETED
