"""Reinforcement learning, one step after another: generate, reward, train, give the engines the new weights."""

from argparse import Namespace

from slime.arguments import parse_args


def train(args: Namespace) -> None:
    """Run `args.num_rollout` steps; each samples with exactly the weights that the step before it made."""
    from slime.ray.run import Run

    with Run(args) as run:
        if run.missing_evaluation is not None:
            run.evaluate(run.missing_evaluation)
        for rollout_id in run.schedule:
            with run.step(rollout_id):
                shards = run.generate(rollout_id)
                run.train(rollout_id, shards)
                if run.schedule.saves_after(rollout_id):
                    run.save(rollout_id)
                if run.schedule.syncs_after(rollout_id):
                    run.sync()
                if run.schedule.evaluates_after(rollout_id):
                    run.evaluate(rollout_id)


if __name__ == "__main__":
    parsed = parse_args()  # refuses a wrong command line before anything heavy is imported
    from slime.ray.run import errors_in_words

    with errors_in_words():
        train(parsed)
