"""The whole configuration of a run as one frozen value: slime's groups, other projects' flags, and facts."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slime.config import groups as g
from slime.config.files import Files
from slime.config.machine import Machine

FULLY_ASYNC_ROLLOUT = "slime.rollout.fully_async_rollout.generate_rollout_fully_async"
"""The rollout function of slime's own that keeps groups in flight between rollouts."""


@dataclass(frozen=True)
class Config:
    """What was asked for and what the machine and the files say; `resolve` turns it into a `Plan`."""

    run: g.RunConfig
    cluster: g.ClusterConfig
    rollout: g.RolloutConfig
    engine: g.EngineConfig
    data: g.DataConfig
    batch: g.BatchConfig
    eval: g.EvalConfig
    algorithm: g.AlgorithmConfig
    correction: g.CorrectionConfig
    distillation: g.DistillationConfig
    reward: g.RewardConfig
    train: g.TrainConfig
    checkpoint: g.CheckpointConfig
    weight_sync: g.WeightSyncConfig
    asynchronous: g.AsyncConfig
    fault_tolerance: g.FaultToleranceConfig
    logging: g.LoggingConfig
    debug: g.DebugConfig
    network: g.NetworkConfig
    megatron: Mapping[str, Any] = field(default_factory=dict)
    """Megatron-LM's values by dest."""
    sglang: Mapping[str, Any] = field(default_factory=dict)
    """SGLang's values by `sglang_` dest."""
    router: Mapping[str, Any] = field(default_factory=dict)
    """The router's values by `router_` dest."""
    given: frozenset[str] = frozenset()
    """Dests that the user set; all others hold defaults."""
    loop: Literal["sync", "async"] = "sync"
    """`sync`: generation and training take turns (train.py); `async`: they run together (train_async.py)."""
    machine: Machine = field(default_factory=lambda: Machine(cores=1))
    files: Files = field(default_factory=Files)
    eval_datasets: tuple[Any, ...] = ()
    """The `EvalDatasetConfig`s that the evaluation flags ask for."""

    @classmethod
    def from_values(cls, values: Mapping[str, Any], **facts: Any) -> "Config":
        """Typed groups out of flat values (dest -> value); a group's missing values take their defaults."""
        typed = {
            name: group(**{f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values})
            for name, group in g.GROUPS.items()
        }
        return cls(**typed, **facts)

    @property
    def skips_engines(self) -> bool:
        """Whether no engine is started because samples come from a file or are not generated."""
        return self.debug.debug_train_only or self.debug.load_debug_rollout_data is not None

    @property
    def is_external(self) -> bool:
        """Whether the engines are servers that already run."""
        return self.rollout.rollout_external_engine_addrs is not None

    @property
    def uses_reference(self) -> bool:
        """Whether a KL term needs the reference model."""
        return self.algorithm.kl_coef != 0 or self.algorithm.use_kl_loss

    @property
    def uses_default_rollout(self) -> bool:
        """Whether slime's own rollout function makes the samples."""
        return self.rollout.rollout_function_path == g.RolloutConfig.rollout_function_path

    @property
    def is_fully_async(self) -> bool:
        """Whether the rollout function keeps groups in flight from one rollout to the next."""
        return self.rollout.rollout_function_path == FULLY_ASYNC_ROLLOUT

    @property
    def samples_per_rollout(self) -> int:
        """Responses of one rollout; 0 while --rollout-batch-size is missing."""
        return (self.batch.rollout_batch_size or 0) * self.batch.n_samples_per_prompt
