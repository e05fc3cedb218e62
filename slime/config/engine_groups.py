"""Groups of engines of one kind: what `--sglang-config`, `--prefill-num-servers` or neither asks for. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from slime.config.config import Config
from slime.config.errors import ConfigError

DEFAULT_MODEL = "default"
WorkerType = Literal["regular", "prefill", "decode", "placeholder"]
_MODEL_KEYS = ("name", "model_path", "update_weights", "num_gpus_per_engine", "server_groups", "engine_groups")
_GROUP_KEYS = ("worker_type", "num_gpus", "num_gpus_per_engine", "overrides")
_EXAMPLE = (
    "write `sglang: [{name: actor, server_groups: [{worker_type: regular, num_gpus: 2, num_gpus_per_engine: 1, "
    "overrides: {mem_fraction_static: 0.8}}]}]`"
)
_OF_PLACEMENT = (
    "model_path", "tp_size", "tensor_parallel_size", "port", "host", "nnodes", "node_rank", "device", "nccl_port",
    "dist_init_addr", "random_seed", "api_key", "admin_api_key",
    "disaggregation_mode",
)  # fmt: skip
"""Fields of a server that the run decides; no override changes them."""


@dataclass(frozen=True)
class EngineGroup:
    """Engines with the same settings, on consecutive devices."""

    model: str
    """Name of the model, which has a router of its own."""
    model_path: str | None
    """Its HuggingFace folder; None for --hf-checkpoint."""
    updates_weights: bool
    """Whether the trainer's weights go to these engines."""
    worker_type: WorkerType
    num_gpus: int
    num_gpus_per_engine: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """SGLang's server arguments of this group alone, by field name."""

    @property
    def num_engines(self) -> int:
        """0 for a placeholder, which only keeps its devices free."""
        return 0 if self.worker_type == "placeholder" else self.num_gpus // self.num_gpus_per_engine


def engine_groups(config: Config, num_gpus: int) -> tuple[EngineGroup, ...]:
    """The groups that share out `num_gpus` devices, in the order of the devices.

    Raises:
        ConfigError: the file says something else than groups, or the numbers do not go together.
    """
    per_engine = config.cluster.rollout_num_gpus_per_engine
    if config.engine.sglang_config is not None:
        return _from_file(config, num_gpus) if config.files.sglang_config is not None else ()
    if num_gpus == 0:
        return ()
    if config.engine.prefill_num_servers is not None:
        return _prefill_and_decode(config.engine.prefill_num_servers, num_gpus, per_engine)
    return (EngineGroup(DEFAULT_MODEL, None, True, "regular", num_gpus, per_engine),)


def gpus_of_file(config: Config) -> int:
    """Devices that the groups of --sglang-config need together; what is no number counts 0 (`engine_groups` tells)."""
    if config.files.sglang_config is None:
        return 0
    numbers = [group.get("num_gpus") for model in _models(config) for group in _groups_of(model, config)]
    return sum(number for number in numbers if isinstance(number, int))


def _prefill_and_decode(num_servers: int, num_gpus: int, per_engine: int) -> tuple[EngineGroup, ...]:
    prefill = num_servers * per_engine
    if num_servers < 1 or prefill >= num_gpus:
        raise ConfigError(
            f"--prefill-num-servers {num_servers} x --rollout-num-gpus-per-engine {per_engine} leaves "
            f"{max(0, num_gpus - prefill)} of --rollout-num-gpus {num_gpus} devices to decode on; give it at least 1 "
            "server and leave at least one engine to decode"
        )
    return (
        EngineGroup(DEFAULT_MODEL, None, True, "prefill", prefill, per_engine),
        EngineGroup(DEFAULT_MODEL, None, True, "decode", num_gpus - prefill, per_engine),
    )


def _from_file(config: Config, num_gpus: int) -> tuple[EngineGroup, ...]:
    flag = f"--sglang-config {config.engine.sglang_config}"
    groups = [_group(flag, config, model, group) for model in _models(config) for group in _groups_of(model, config)]
    if not groups:
        raise ConfigError(f"{flag}: describes no engines; {_EXAMPLE}")
    total = sum(group.num_gpus for group in groups)
    if total != num_gpus:
        raise ConfigError(
            f"{flag}: its groups need {total} devices together, but --rollout-num-gpus is {num_gpus}; "
            f"type --rollout-num-gpus {total}, or leave it out"
        )
    _check_one_model_one_path(flag, groups)
    sizes = {group.num_gpus_per_engine for group in groups if group.updates_weights and group.num_engines}
    if len(sizes) > 1:
        raise ConfigError(
            f"{flag}: engines that get the trainer's weights have {' and '.join(map(str, sorted(sizes)))} devices; "
            "what proves that the weights arrived is taken for one size, so give them the same num_gpus_per_engine"
        )
    if not sizes:
        raise ConfigError(f"{flag}: no group has update_weights, so the trained model would not generate; set it once")
    return tuple(groups)


def _models(config: Config) -> list[Mapping[str, Any]]:
    flag = f"--sglang-config {config.engine.sglang_config}"
    root = config.files.sglang_config
    models = root.get("sglang") if isinstance(root, Mapping) else None
    if not isinstance(models, list) or not all(isinstance(model, Mapping) for model in models):
        raise ConfigError(f"{flag}: has no list `sglang` at the top; {_EXAMPLE}")
    for model in models:
        _check_keys(flag, "model", model, _MODEL_KEYS)
        if not isinstance(model.get("name"), str):
            raise ConfigError(f"{flag}: a model has no name; {_EXAMPLE}")
    return models


def _groups_of(model: Mapping[str, Any], config: Config) -> list[Mapping[str, Any]]:
    groups = model.get("server_groups", model.get("engine_groups"))
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise ConfigError(
            f"--sglang-config {config.engine.sglang_config}: {model['name']} has no list server_groups; {_EXAMPLE}"
        )
    return groups


def _group(flag: str, config: Config, model: Mapping[str, Any], group: Mapping[str, Any]) -> EngineGroup:
    name = model["name"]
    _check_keys(flag, f"group of {name}", group, _GROUP_KEYS)
    kind, num_gpus = group.get("worker_type", "regular"), group.get("num_gpus")
    if kind not in get_args(WorkerType):
        known = ", ".join(get_args(WorkerType))
        also = " (encoders serve images, and only text models are trained)" if kind == "encoder" else ""
        raise ConfigError(f"{flag}: {name} has a group of worker_type {kind!r}{also}; there are {known}")
    per_engine = group.get("num_gpus_per_engine") or model.get("num_gpus_per_engine")
    per_engine = per_engine or config.cluster.rollout_num_gpus_per_engine
    if type(num_gpus) is not int or num_gpus < 1 or not isinstance(per_engine, int) or num_gpus % per_engine:
        raise ConfigError(
            f"{flag}: a {kind} group of {name} has num_gpus {num_gpus!r} for engines of {per_engine!r}; give a number "
            "of devices above 0 that the size of an engine divides"
        )
    overrides = group.get("overrides") or {}
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"{flag}: the overrides of {name} are {overrides!r}; {_EXAMPLE}")
    own_path = overrides.get("model_path", model.get("model_path"))
    overrides = {key: value for key, value in overrides.items() if key != "model_path"}
    if decided := [key for key in overrides if key in _OF_PLACEMENT]:
        raise ConfigError(f"{flag}: {name} overrides {', '.join(decided)}, which the run decides; leave it out")
    share = overrides.get("mem_fraction_static")
    if share is not None and (not isinstance(share, int | float) or not 0 < share < 1):
        raise ConfigError(
            f"{flag}: {name} has mem_fraction_static {share!r}; give its share of a GPU, above 0 and below 1"
        )
    is_trained = own_path in (None, config.rollout.hf_checkpoint)
    updates = model.get("update_weights")
    return EngineGroup(
        name, own_path, is_trained if updates is None else bool(updates), kind, num_gpus, per_engine, overrides
    )


def _check_keys(flag: str, what: str, mapping: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if unknown := [key for key in mapping if key not in known]:
        raise ConfigError(f"{flag}: a {what} has {', '.join(map(str, unknown))}; there are {', '.join(known)}")


def _check_one_model_one_path(flag: str, groups: list[EngineGroup]) -> None:
    for group in groups:
        paths = {other.model_path for other in groups if other.model == group.model}
        kinds = {other.worker_type for other in groups if other.model == group.model} - {"placeholder"}
        if len(paths) > 1:
            raise ConfigError(f"{flag}: {group.model} has the paths {paths}; a model has one, so give each its name")
        if kinds & {"prefill", "decode"} and kinds != {"prefill", "decode"}:
            raise ConfigError(
                f"{flag}: {group.model} has only {' and '.join(sorted(kinds))} engines; prefill and decode engines "
                "need each other, and no regular ones beside them"
            )
