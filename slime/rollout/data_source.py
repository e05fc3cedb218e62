"""Where prompts come from and where unfinished samples go back to: the data buffer between dataset and engines."""

import contextlib
import inspect
import logging
import threading
from abc import ABC, abstractmethod
from argparse import Namespace
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from slime.rollout.sample_state import from_state, to_state
from slime.rollout.staleness import weight_clock
from slime.utils.checkpoint_folder import rollout_state_path
from slime.utils.data import Dataset
from slime.utils.durable import partial_path, put_in_place
from slime.utils.misc import load_function
from slime.utils.processing_utils import load_processor, load_tokenizer
from slime.utils.types import Sample

logger = logging.getLogger(__name__)

Group = list[Sample]
"""The samples of one prompt."""

Origin = tuple[int, int]
"""Where a prompt came from: the epoch, and the row of the prompt file (see `Dataset.rows`)."""


class Holder(Protocol):
    """Whoever keeps groups from one rollout to the next, and so knows what a checkpoint must bring back."""

    def state_after(self, rollout_id: int) -> dict[str, Any]:
        """The source's state with all groups that no rollout up to `rollout_id` has taken."""


class DataSource(ABC):
    """What the rollout manager asks of a data source."""

    @abstractmethod
    def get_samples(self, num_samples: int) -> list[Group]:
        """`num_samples` groups, one a prompt."""

    @abstractmethod
    def add_samples(self, samples: list[Group]) -> None:
        """Take groups back that are not finished."""

    @abstractmethod
    def save(self, rollout_id: int) -> None:
        """Write down where the source stands after `rollout_id`."""

    @abstractmethod
    def load(self, rollout_id: int | None = None) -> None:
        """Continue after `rollout_id`."""

    @abstractmethod
    def __len__(self) -> int:
        """Prompts in one epoch."""


class RolloutDataSource(DataSource):
    """Reads `--prompt-data` from front to back, epoch after epoch; without a dataset it gives empty samples."""

    args: Namespace
    dataset: Dataset | None
    epoch_id: int
    sample_offset: int
    sample_group_index: int
    sample_index: int
    metadata: dict[str, Any]
    outstanding: dict[int, Origin]
    """Where the groups came from that were handed out and of which no rollout has said yet what became of them, by
    `group_index`; those that wait in a buffer among them."""
    lock: "threading.RLock"
    """Held by whoever draws, gives back, or reads counters that belong together, while others may."""
    holder: Holder | None = None
    _frozen: dict[str, Any] | None = None

    def __init__(self, args: Namespace) -> None:
        self.prepare(args)

    def prepare(self, args: Namespace) -> None:
        """Set what is not set yet; subclasses may so have an `__init__` of their own without calling this one's."""
        state = vars(self)
        state.setdefault("args", args)
        for name in ("epoch_id", "sample_offset", "sample_group_index", "sample_index"):
            state.setdefault(name, 0)
        state.setdefault("metadata", {})
        state.setdefault("outstanding", {})
        state.setdefault("lock", threading.RLock())
        if "dataset" not in state:
            self.dataset = self._read_dataset()

    def _read_dataset(self) -> Dataset | None:
        args = self.args
        if not args.rollout_global_dataset or args.prompt_data is None:
            return None
        _refuse_unsupported(args)
        needs_tokens = args.apply_chat_template or args.rollout_max_prompt_len is not None
        dataset = Dataset(
            args.prompt_data,
            self.tokenizer if needs_tokens else None,
            self.processor,
            args.rollout_max_prompt_len,
            prompt_key=args.input_key,
            multimodal_keys=args.multimodal_keys,
            label_key=args.label_key,
            tool_key=args.tool_key,
            metadata_key=args.metadata_key,
            seed=args.rollout_seed,
            apply_chat_template=args.apply_chat_template,
            apply_chat_template_kwargs=args.apply_chat_template_kwargs,
        )
        if args.rollout_shuffle:
            dataset.shuffle(self.epoch_id)
        self._dump_details()
        return dataset

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.args.hf_checkpoint, trust_remote_code=getattr(self.args, "trust_remote_code", False))

    @cached_property
    def processor(self) -> Any | None:
        if self.args.hf_checkpoint is None:
            return None
        return load_processor(self.args.hf_checkpoint, trust_remote_code=getattr(self.args, "trust_remote_code", False))

    def _dump_details(self) -> None:
        folder = getattr(self.args, "dump_details", None)
        if folder is None:
            return
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")
        if self.processor is not None:
            self.processor.save_pretrained(Path(folder) / "processor")

    def get_samples(self, num_samples: int) -> list[Group]:
        groups = []
        for prompt, origin in self._next_prompts(num_samples):
            if origin is not None:
                self.outstanding[self.sample_group_index] = origin
            groups.append(self._make_group(prompt))
        return groups

    def _next_prompts(self, num_prompts: int) -> list[tuple[Sample, Origin | None]]:
        if self.dataset is None:
            return [(Sample(), None) for _ in range(num_prompts)]
        prompts: list[tuple[Sample, Origin | None]] = []
        while len(prompts) < num_prompts:
            if self.sample_offset >= len(self.dataset):
                self.epoch_id += 1
                self.sample_offset = 0
                if self.args.rollout_shuffle:
                    self.dataset.shuffle(self.epoch_id)
            taken = slice(self.sample_offset, self.sample_offset + num_prompts - len(prompts))
            rows = self.dataset.rows[taken]
            prompts += zip(self.dataset.samples[taken], [(self.epoch_id, row) for row in rows], strict=True)
            self.sample_offset += len(rows)
        return prompts

    @property
    def position(self) -> tuple[int, int] | None:
        """The epoch, and how many of its prompts were handed out; None without a dataset that is read in order."""
        return None if self.dataset is None else (self.epoch_id, self.sample_offset)

    def _make_group(self, prompt: Sample) -> Group:
        group = []
        for _ in range(self.args.n_samples_per_prompt):
            sample = deepcopy(prompt)
            sample.group_index = self.sample_group_index
            sample.index = self.sample_index
            self.sample_index += 1
            group.append(sample)
        self.sample_group_index += 1
        return group

    def add_samples(self, samples: list[Group]) -> None:
        """Nothing can be given back to a source without a buffer.

        Raises:
            RuntimeError: unless the list is empty.
        """
        if samples:
            raise RuntimeError(
                f"{type(self).__name__} has no buffer to take {len(samples)} groups back. Use "
                "--data-source-path slime.rollout.data_source.RolloutDataSourceWithBuffer."
            )

    def state(self) -> dict[str, Any]:
        """What `save` writes; made of plain data, see `sample_state`."""
        return {
            "sample_offset": self.sample_offset,
            "epoch_id": self.epoch_id,
            "sample_group_index": self.sample_group_index,
            "sample_index": self.sample_index,
            "metadata": to_state(self.metadata, "metadata"),
            "outstanding": [[group_index, *origin] for group_index, origin in self.outstanding.items()],
            "trained_by_version": weight_clock().state(),
        }

    def freeze(self, state: dict[str, Any] | None = None) -> None:
        """Until `thaw`, `save` writes `state`, or that of now: the checkpoint is of before a rollout that has begun."""
        self._frozen = self.state() if state is None else state

    def thaw(self) -> None:
        """`save` writes the present state again."""
        self._frozen = None

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        for name in ("sample_offset", "epoch_id", "sample_group_index", "sample_index"):
            setattr(self, name, int(state.get(name, 0)))
        self.metadata = from_state(state.get("metadata", {}))
        self.outstanding = {group: (epoch, row) for group, epoch, row in state.get("outstanding", [])}
        weight_clock().restore(state.get("trained_by_version", {}))
        if self.dataset is not None and self.args.rollout_shuffle:
            self.dataset.shuffle(self.epoch_id)

    def save(self, rollout_id: int) -> None:
        """Write the state to `<save>/rollout/global_dataset_state_dict_<rollout_id>.pt`: the present one, what `freeze`
        kept, or what the holder knows.

        It is there whole or not at all.
        """
        if not self.args.rollout_global_dataset:
            return
        import torch

        path = _state_path(self.args.save, rollout_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self._state_to_save(rollout_id), partial_path(path))
        put_in_place(partial_path(path), path)

    def _state_to_save(self, rollout_id: int) -> dict[str, Any]:
        if self.holder is not None:
            return self.holder.state_after(rollout_id)
        return self.state() if self._frozen is None else self._frozen

    def load(self, rollout_id: int | None = None) -> None:
        """Continue after `rollout_id` from the state in `<load>`.

        Raises:
            ValueError: there is none, and it was not said (--finetune, --start-rollout-id) that the run starts anew.
        """
        if not self.args.rollout_global_dataset or self.args.load is None or rollout_id is None:
            return
        import torch

        path = _state_path(self.args.load, rollout_id)
        if not path.is_file():
            if not (rollout_id < 0 or _starts_where_told(self.args)):
                raise ValueError(
                    f"The checkpoint of rollout {rollout_id} in {self.args.load} has no data source state ({path} is "
                    "missing), so prompts would be used twice. Give the state's file back, or begin with the first "
                    "prompt: with the weights alone by --finetune, or at another rollout by --start-rollout-id "
                    f"{rollout_id + 1}."
                )
            logger.info("no data source state at %s; prompts start from the beginning", path)
            return
        self.restore(torch.load(path, weights_only=True))
        logger.info(
            "data source continues after rollout %d: epoch %d, row %d", rollout_id, self.epoch_id, self.sample_offset
        )

    def __len__(self) -> int:
        return 0 if self.dataset is None else len(self.dataset)


class RolloutDataSourceWithBuffer(RolloutDataSource):
    """A source that takes groups back and hands them out before it reads on."""

    buffer: list[Group]

    def prepare(self, args: Namespace) -> None:
        super().prepare(args)
        vars(self).setdefault("buffer", [])

    def get_samples(self, num_samples: int) -> list[Group]:
        groups = self._get_samples_from_buffer(num_samples)
        return groups + super().get_samples(num_samples - len(groups))

    def _get_samples_from_buffer(self, num_samples: int) -> list[Group]:
        if not self.buffer or num_samples == 0:
            return []
        # A filter written as a plug-in takes (args, rollout_id, buffer, num_samples), a method (args, buffer, n).
        choose: Any = self.buffer_filter
        takes_rollout_id = len(inspect.signature(choose).parameters) > 3
        given = (None, self.buffer, num_samples) if takes_rollout_id else (self.buffer, num_samples)
        chosen: list[Group] = list(choose(self.args, *given))
        if len(chosen) > num_samples:
            raise ValueError(f"The buffer filter chose {len(chosen)} groups where {num_samples} were asked for.")
        taken = {id(group) for group in chosen}
        self.buffer[:] = [group for group in self.buffer if id(group) not in taken]
        return chosen

    def buffer_filter(self, args: Namespace, buffer: list[Group], num_samples: int) -> list[Group]:
        """Which groups of the buffer go out next, at most `num_samples`: what `--buffer-filter-path` chooses.

        Subclasses may override it. Chosen groups leave the buffer, whether the filter removes them or not.
        """
        path = getattr(args, "buffer_filter_path", None)
        choose = pop_first if path is None else load_function(path)
        chosen: list[Group] = choose(args, None, buffer, num_samples)
        return chosen

    def add_samples(self, samples: list[Group]) -> None:
        """Keep groups for a later `get_samples`; each has --n-samples-per-prompt members."""
        if not samples:
            return
        assert isinstance(samples, list), f"add_samples takes a list of groups, not {type(samples).__name__}."
        size = self.args.n_samples_per_prompt
        for group in samples:
            assert isinstance(group, list), f"A group is a list of samples, not {type(group).__name__}."
            assert len(group) == size, f"A group has {len(group)} members; --n-samples-per-prompt is {size}."
        self.buffer.extend(samples)

    def state(self) -> dict[str, Any]:
        return super().state() | {"buffer": to_state(self.buffer, "buffer")}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.buffer = from_state(state.get("buffer", []))

    def update_metadata(self, metadata: dict[str, Any]) -> None:
        self.metadata.update(metadata)

    def get_metadata(self) -> dict[str, Any]:
        return self.metadata

    def get_buffer_length(self) -> int:
        return len(self.buffer)


def exclusive(source: Any) -> contextlib.AbstractContextManager[Any]:
    """Hold a source's lock, where it has one: a class of a user's own is trusted to care for itself."""
    lock: contextlib.AbstractContextManager[Any] = getattr(source, "lock", None) or contextlib.nullcontext()
    return lock


def pop_first(args: Namespace, rollout_id: int | None, buffer: list[Group], num_samples: int) -> list[Group]:
    """Oldest groups first; what is returned leaves the buffer."""
    chosen = buffer[:num_samples]
    del buffer[:num_samples]
    return chosen


def load_data_source(args: Namespace) -> Any:
    """The data source that `--data-source-path` names, ready for use.

    Besides classes with `__init__(self, args)` it takes subclasses of ours whose `__init__` takes no arguments or does
    not call `super().__init__`, and classes that only have `get_samples` and `add_samples`.
    """
    path: str = args.data_source_path
    cls = load_function(path, ("RolloutDataSourceWithBuffer", "RolloutDataSource")) if path.endswith(".py") else None
    cls = load_function(path) if cls is None else cls
    source = cls(args) if _takes_args(cls) else cls()
    if isinstance(source, RolloutDataSource):
        source.prepare(args)
        return source
    missing = [name for name in ("save", "load", "__len__") if not hasattr(source, name)]
    if not missing:
        return source
    if not hasattr(source, "get_samples"):
        raise TypeError(f"--data-source-path {path!r}: {cls.__name__} has no get_samples(num_samples).")
    return _PlainDataSource(args, source)


class _PlainDataSource(RolloutDataSourceWithBuffer):
    """A user's class with little more than `get_samples`, completed with what the rollout manager asks for."""

    def __init__(self, args: Namespace, source: Any) -> None:
        super().__init__(args)
        self.source = source
        for name, value in (("args", args), ("dataset", self.dataset)):
            if not hasattr(source, name):
                setattr(source, name, value)

    def get_samples(self, num_samples: int) -> list[Group]:
        """What the class returns; single samples become groups with indices. Groups of a checkpoint come first."""
        groups, self.buffer[:num_samples] = self.buffer[:num_samples], []
        if len(groups) == num_samples:
            return groups
        for item in self.source.get_samples(num_samples - len(groups)):
            groups.append(self._make_group(item) if isinstance(item, Sample) else item)
        return groups

    def add_samples(self, samples: list[Group]) -> None:
        if samples and not hasattr(self.source, "add_samples"):
            raise RuntimeError(f"{type(self.source).__name__} has no add_samples to take {len(samples)} groups back.")
        if samples:
            self.source.add_samples(samples)

    @property
    def position(self) -> None:
        """The class draws as it likes."""
        return None

    def state(self) -> dict[str, Any]:
        own = getattr(self.source, "buffer", None)
        drawn = 0 if self.dataset is None else self.dataset.num_drawn
        return super().state() | {"num_drawn": drawn, "source_buffer": to_state(own, "buffer")}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        if self.dataset is not None:
            self.dataset.num_drawn = int(state.get("num_drawn", 0))
        if state.get("source_buffer") is not None:
            self.source.buffer = from_state(state["source_buffer"])


def _takes_args(cls: Any) -> bool:
    """Whether a class or factory can be called with one positional argument."""
    try:
        inspect.signature(cls).bind(object())
    except TypeError:
        return False
    return True


def _refuse_unsupported(args: Namespace) -> None:
    if getattr(args, "streaming_data", False):
        raise ValueError(
            "--streaming-data is not built yet: the whole prompt file is read at the start. Leave the flag out."
        )
    if getattr(args, "num_data_workers", 0):
        raise ValueError(
            f"--num-data-workers {args.num_data_workers} is not built yet: the rollout manager prepares prompts. "
            "Leave the flag out, or give 0."
        )


def _starts_where_told(args: Namespace) -> bool:
    """Whether the command line says where to start, rather than the checkpoint."""
    return getattr(args, "finetune", False) or getattr(args, "start_rollout_id", None) is not None


def _state_path(folder: str | None, rollout_id: int) -> Path:
    if folder is None:
        raise ValueError("The data source has nowhere to save to: give --save.")
    return rollout_state_path(folder, rollout_id)
