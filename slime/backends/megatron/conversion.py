"""A model's weights from a HuggingFace folder to Megatron's distributed checkpoint and back, in one process on the CPU.

Nothing is rounded: either side is written in the number format that the other has.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from slime.backends.megatron import checkpoint, parallel
from slime.backends.megatron.checkpoint_format import CheckpointWriter, read_metadata
from slime.backends.megatron.config import transformer_config
from slime.backends.megatron.model import PolicyModel
from slime.backends.megatron.weights import MegatronWeights, load_hf_weights
from slime.models import ModelShape
from slime.models.families import family_of
from slime.models.hf_folder import DEFAULT_SHARD_BYTES, HfReader, save_hf_folder
from slime.models.shape import read_config
from slime.models.table import EMBEDDING
from slime.utils.checkpoint_folder import LATEST_FILE, Checkpoint, begin_files, check_space, commit
from slime.utils.rendezvous import keep_gloo_on

_BUCKET_BYTES = 1 << 30
_SPACE_MARGIN_BYTES = 64 << 20


def hf_to_torch_dist(hf_checkpoint: str | Path, save: str | Path) -> Path:
    """Write the weights of a HuggingFace folder to `{save}/release`, from which --load and --ref-load start.

    Raises:
        ValueError: `save` holds checkpoints of a run, or the folder is not the model that its config.json describes.
        OSError: the disk has not the room.
    """
    save = Path(save)
    tracker = save / LATEST_FILE
    if tracker.is_file() and tracker.read_text().strip() != "release":
        raise ValueError(f"--save {save} holds checkpoints of a run ({LATEST_FILE} is there): choose another folder.")
    config = read_config(hf_checkpoint)
    family = family_of(config)
    reader = HfReader(hf_checkpoint)
    dtype = _common_dtype([reader.tensor(name).dtype for name in reader.names()])
    with _one_process():
        model = _model(family.shape_of(config), dtype)
        load_hf_weights([model], hf_checkpoint)
        state = checkpoint.model_state([model]) | {"hf_config": dict(config), "has_optimizer": False}
        needed = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
        check_space(save, needed + _SPACE_MARGIN_BYTES, f"The checkpoint of {hf_checkpoint}")
        unfinished = begin_files(save, None)
        writer = CheckpointWriter(state, unfinished)
        writer.write()
        writer.finish()
        return commit(save, None, unfinished)


def torch_dist_to_hf(
    found: Checkpoint,
    output: str | Path,
    origin: str | Path,
    *,
    model_type: str | None = None,
    adds_missing: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    allow_pickle: bool = False,
) -> None:
    """Write the weights of a checkpoint as a HuggingFace folder, with the other files of `origin`.

    Args:
        model_type: whose names to use, where it is not that of the config.json of `origin`.
        adds_missing: also copy tensors of `origin` that the checkpoint has not.
        shard_bytes: how large a file of weights becomes.

    Raises:
        ValueError: the checkpoint is not of the model that `origin` describes, or not safe to read.
    """
    config = read_config(origin)
    family = family_of(config | {"model_type": model_type} if model_type else config)
    metadata = read_metadata(found.path, allow_pickle=allow_pickle)
    shape = family.shape_of(config)
    _check_names(metadata.state_dict_metadata.keys(), found.path, shape, origin)
    dtype = metadata.state_dict_metadata[EMBEDDING].properties.dtype
    with _one_process():
        model = _model(shape, dtype)
        checkpoint.load(found, [model], allow_pickle=allow_pickle)
        size = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
        check_space(
            Path(output).absolute().parent, size + _SPACE_MARGIN_BYTES, f"The HuggingFace folder of {found.path}"
        )
        buckets = _buckets(MegatronWeights([model], family, shape), origin if adds_missing else None)
        save_hf_folder(output, origin, buckets, shard_bytes)


def _buckets(weights: MegatronWeights, origin: str | Path | None) -> Iterator[Sequence[tuple[str, Tensor]]]:
    yield from weights.buckets(_BUCKET_BYTES)
    if origin is not None:
        reader, own = HfReader(origin), set(weights.names())
        for name in reader.names():
            if name not in own:
                yield [(name, reader.tensor(name))]


def _check_names(names: Sequence[str], path: Path, shape: ModelShape, origin: str | Path) -> None:
    if EMBEDDING not in names:
        raise ValueError(f"{path} holds no {EMBEDDING}: it is no checkpoint of a language model by Megatron-core.")
    has_output = "output_layer.weight" in names
    if has_output == shape.is_tied:
        seen, said = ("an output layer", "tied") if has_output else ("no output layer", "untied")
        raise ValueError(
            f"{path} holds {seen}, but config.json in {origin} says that embeddings are {said}: give the "
            "--origin-hf-dir of the model that was trained."
        )


def _common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The one format that holds all of them exactly."""
    kinds = set(dtypes)
    return kinds.pop() if len(kinds) == 1 else torch.float32


@contextmanager
def _one_process() -> Iterator[None]:
    """Megatron's process groups, of this process alone."""
    keep_gloo_on("127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        parallel.seed_everything(0)
        yield
    finally:
        parallel.close()


def _model(shape: ModelShape, dtype: torch.dtype) -> PolicyModel:
    """An empty model of a shape; weights are not set."""
    args = Namespace(
        bf16=dtype is torch.bfloat16, fp16=dtype is torch.float16, megatron_field_dests={}, swiglu=True,
        group_query_attention=True, multi_latent_attention=False,
    )  # fmt: skip
    return PolicyModel(transformer_config(args, shape), shape)
