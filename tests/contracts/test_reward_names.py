"""The rewards that the command line accepts are those that exist."""

from slime.config.rules.algorithm import REWARDS
from slime.rollout.rm_hub.dispatch import GRADERS, REASONING_GYM, REMOTE


def test_every_reward_that_exists_is_accepted_and_no_other() -> None:
    assert set(REWARDS) == {*GRADERS, REMOTE, REASONING_GYM.rstrip(":")}
