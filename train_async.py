"""Reinforcement learning with generation ahead of training: rollouts are made while earlier ones are trained on."""

from argparse import Namespace

from slime.arguments import parse_args


def train(args: Namespace) -> None:
    """Run `args.num_rollout` steps; no sample is more than `args.max_staleness` of them older than what it trains."""
    from slime.ray.run import Run

    with Run(args) as run:
        if run.missing_evaluation is not None:
            run.evaluate(run.missing_evaluation)
        for rollout_id in run.schedule:
            with run.step(rollout_id):
                run.generate_ahead(rollout_id)
                shards = run.take(rollout_id)
                run.train(rollout_id, shards)
                if run.schedule.saves_after(rollout_id):
                    run.save(rollout_id)
                if run.schedule.syncs_after(rollout_id):
                    run.sync()
                if run.schedule.evaluates_after(rollout_id):
                    run.evaluate(rollout_id)


if __name__ == "__main__":
    parsed = parse_args(loop="async")  # refuses a wrong command line before anything heavy is imported
    from slime.ray.run import errors_in_words

    with errors_in_words():
        train(parsed)
