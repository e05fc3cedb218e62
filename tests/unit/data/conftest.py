"""Arguments and samples for the tests of the data room."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest

from slime.utils.types import Sample


@pytest.fixture
def make_args() -> Callable[..., Namespace]:
    """The flags that this room reads, at their defaults, with changes."""

    def make(**changes: Any) -> Namespace:
        defaults = dict(
            advantage_estimator="grpo",
            rewards_normalization=True,
            grpo_std_normalization=True,
            n_samples_per_prompt=2,
            rollout_batch_size=2,
            global_batch_size=4,
            reward_key=None,
            custom_reward_post_process_path=None,
            custom_convert_samples_to_train_data_path=None,
            rollout_top_p=1.0,
            use_rollout_routing_replay=False,
            use_dynamic_batch_size=True,
            max_tokens_per_gpu=100,
            micro_batch_size=1,
            balance_data=False,
            balance_by_flops=False,
            num_layers=2,
            hidden_size=8,
            num_attention_heads=2,
            ffn_hidden_size=16,
            vocab_size=10,
        )
        return Namespace(**(defaults | changes))

    return make


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """A finished sample: prompt and response tokens, reward, and what else is given."""

    def make(prompt: list[int], response: list[int], reward: Any = 0.0, **fields: Any) -> Sample:
        fields = {"status": Sample.Status.COMPLETED} | fields
        return Sample(tokens=prompt + response, response_length=len(response), reward=reward, **fields)

    return make
