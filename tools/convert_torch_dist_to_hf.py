"""Converts a checkpoint of Megatron's (one of slime's, or a `release`) to a HuggingFace folder.

    python tools/convert_torch_dist_to_hf.py --input-dir outputs/run/checkpoints/iter_0000099 \\
        --output-dir exported --origin-hf-dir Qwen3-4B

It runs in one process on the CPU and reads the weights alone, whatever layout they were saved under. Tokenizer, config
and chat template come from --origin-hf-dir. (train.py --save-hf writes the same while it trains.)
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from slime.config.files import read_hf_config
from slime.utils.checkpoint_folder import find_checkpoint


def main() -> int:
    """Run the command line; returns the exit code."""
    args, prog = _parse()
    try:
        _check(args)
        found = find_checkpoint(args.input_dir, flag="--input-dir with iteration")
        if found is None:
            raise ValueError(
                f"--input-dir {args.input_dir} is no Megatron checkpoint: give a folder that holds "
                "latest_checkpointed_iteration.txt, or one iter_0000012 in it."
            )
        from slime.backends.megatron.accelerator import accelerator_for

        accelerator_for("cpu").install()
        from slime.backends.megatron.conversion import torch_dist_to_hf

        torch_dist_to_hf(
            found,
            args.output_dir,
            args.origin_hf_dir,
            model_type=args.model_name,
            adds_missing=args.add_missing_from_origin_hf,
            shard_bytes=args.chunk_size,
            allow_pickle=args.allow_pickle_checkpoints,
        )
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.output_dir} from {found.path}")
    return 0


def _parse() -> tuple[argparse.Namespace, str]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input-dir", required=True, metavar="DIR", help="iter_0000012, release, or their folder")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="HuggingFace folder to make")
    parser.add_argument("--origin-hf-dir", required=True, metavar="DIR", help="HuggingFace folder of the same model")
    parser.add_argument("--model-name", metavar="NAME", help="model_type whose tensor names are used")
    parser.add_argument("-f", "--force", action="store_true", help="replace --output-dir if it is there")
    parser.add_argument(
        "-a", "--add-missing-from-origin-hf", action="store_true",
        help="copy tensors of --origin-hf-dir that the checkpoint has not",
    )  # fmt: skip
    parser.add_argument(
        "--chunk-size", type=int, default=5 * 2**30, metavar="BYTES", help="size of one file of weights"
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="refused unless it is that of config.json")
    parser.add_argument(
        "--allow-pickle-checkpoints", action="store_true",
        help="also read checkpoints that could run code; only where you trust who made them",
    )  # fmt: skip
    return parser.parse_args(), parser.prog


def _check(args: argparse.Namespace) -> None:
    config = read_hf_config(args.origin_hf_dir)
    if Path(args.output_dir).exists() and not args.force:
        raise ValueError(f"--output-dir {args.output_dir} is there already: give -f to replace it, or another folder.")
    if args.vocab_size not in (None, config["vocab_size"]):
        raise ValueError(
            f"--vocab-size {args.vocab_size}: config.json in {args.origin_hf_dir} says {config['vocab_size']}, and "
            "transformers would refuse the folder; leave it out."
        )


if __name__ == "__main__":
    sys.exit(main())
