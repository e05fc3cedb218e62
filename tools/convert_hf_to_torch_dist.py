"""Converts a HuggingFace model to Megatron's distributed checkpoint, which --load and --ref-load start from.

    source scripts/models/qwen3-4B.sh
    python tools/convert_hf_to_torch_dist.py ${MODEL_ARGS[@]} --hf-checkpoint Qwen3-4B --save Qwen3-4B_torch_dist

It runs in one process on the CPU, needs memory for the weights once, and loads under any layout. MODEL_ARGS may be left
out: config.json says the same. (train.py also starts from a HuggingFace folder itself.)
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from slime.arguments.parser import read_command_line
from slime.config import ConfigError
from slime.config.files import read_hf_config
from slime.config.model_shape import compare_with_config


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf-checkpoint", required=True, metavar="DIR", help="folder of the HuggingFace model")
    parser.add_argument("--save", required=True, metavar="DIR", help="folder to make; the weights go to DIR/release")
    parser.add_argument("--padded-vocab-size", type=int, metavar="N", help="refused unless it is the vocabulary's size")
    parser.add_argument("--allgather-cp", action="store_true", help="makes no difference to a checkpoint")
    args, model_args = parser.parse_known_args()
    try:
        _check(args, model_args)
        from slime.backends.megatron.accelerator import accelerator_for

        accelerator_for("cpu").install()
        from slime.backends.megatron.conversion import hf_to_torch_dist

        path = hf_to_torch_dist(args.hf_checkpoint, args.save)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path}; start from it with --load {args.save}, or compare with it by --ref-load {args.save}")
    return 0


def _check(args: argparse.Namespace, model_args: list[str]) -> None:
    """The words beside this tool's own describe the model that config.json does."""
    config = read_hf_config(args.hf_checkpoint)
    line = read_command_line([*model_args, "--hf-checkpoint", args.hf_checkpoint, "--save", args.save])
    line.problems.raise_if_any()
    compare_with_config(line.values, frozenset(line.given), config)
    if args.padded_vocab_size not in (None, config["vocab_size"]):
        raise ConfigError(
            f"--padded-vocab-size {args.padded_vocab_size}: the vocabulary has {config['vocab_size']} ids, and is "
            "padded for the layout when a checkpoint is loaded; leave it out."
        )


if __name__ == "__main__":
    sys.exit(main())
