"""Arguments and batches for the tests of the algorithm room."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def make_args() -> Callable[..., Namespace]:
    """The flags that this room reads, at their defaults, with changes."""

    def make(**changes: Any) -> Namespace:
        defaults = dict(
            advantage_estimator="grpo",
            loss_type="policy_loss",
            compute_advantages_and_returns=True,
            calculate_per_token_loss=False,
            custom_advantage_function_path=None,
            custom_loss_function_path=None,
            custom_pg_loss_reducer_function_path=None,
            custom_tis_function_path=None,
            entropy_coef=0.0,
            eps_clip=0.2,
            eps_clip_c=None,
            eps_clip_high=0.2,
            gamma=1.0,
            get_mismatch_metrics=False,
            kl_coef=0.0,
            kl_loss_coef=0.0,
            kl_loss_type="k1",
            lambd=1.0,
            log_probs_chunk_size=-1,
            normalize_advantages=False,
            opd_kl_coef=1.0,
            opd_type=None,
            opsm_delta=1e-4,
            rollout_temperature=1.0,
            tis_clip=2.0,
            tis_clip_low=0.0,
            use_critic=False,
            use_kl_loss=False,
            use_opd=False,
            use_opsm=False,
            use_rollout_logprobs=False,
            use_tis=False,
            use_unbiased_kl=False,
            value_clip=0.2,
        )
        return Namespace(**(defaults | changes))

    return make
