"""Whether the checkpoints that a run starts from can be loaded, before any process is started for it."""

from argparse import Namespace

from slime.config import ConfigError
from slime.config.files import checkpoint_kind
from slime.utils.checkpoint_folder import check_rollout_state, find_checkpoint


def checkpoints_are_whole(args: Namespace) -> None:
    """The checkpoints that --load and --ref-load mean are complete, the first with its rollout state.

    Args:
        args: as `build_args` returns them.

    Raises:
        ConfigError: one is damaged or not there; says what to type.
    """
    try:
        if args.load and checkpoint_kind(args.load) == "megatron" and not args.debug_rollout_only:
            starts_from_reference = args.plan.start.reason.startswith("--ref-load")
            flag = "--ref-ckpt-step" if starts_from_reference else "--ckpt-step"
            found = find_checkpoint(args.load, args.ckpt_step, flag=flag)
            resumes = args.start_rollout_id is None and not args.finetune
            if found is not None and resumes and args.rollout_global_dataset:
                check_rollout_state(found)
        if args.ref_load and checkpoint_kind(args.ref_load) == "megatron":
            find_checkpoint(args.ref_load, args.ref_ckpt_step, flag="--ref-ckpt-step")
    except ValueError as error:
        raise ConfigError(str(error)) from error
