"""The groups of slime's own flags, in the order in which `--help` shows them."""

from slime.config.groups.algorithm import AlgorithmConfig, CorrectionConfig, DistillationConfig, RewardConfig
from slime.config.groups.cluster import ClusterConfig, NetworkConfig, RunConfig
from slime.config.groups.data import BatchConfig, DataConfig
from slime.config.groups.evaluation import EvalConfig
from slime.config.groups.rollout import AsyncConfig, EngineConfig, FaultToleranceConfig, RolloutConfig
from slime.config.groups.tracking import DebugConfig, LoggingConfig
from slime.config.groups.train import CheckpointConfig, TrainConfig, WeightSyncConfig

GROUPS = {
    "run": RunConfig,
    "cluster": ClusterConfig,
    "rollout": RolloutConfig,
    "engine": EngineConfig,
    "data": DataConfig,
    "batch": BatchConfig,
    "eval": EvalConfig,
    "algorithm": AlgorithmConfig,
    "correction": CorrectionConfig,
    "distillation": DistillationConfig,
    "reward": RewardConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "weight_sync": WeightSyncConfig,
    "asynchronous": AsyncConfig,
    "fault_tolerance": FaultToleranceConfig,
    "logging": LoggingConfig,
    "debug": DebugConfig,
    "network": NetworkConfig,
}
"""Name of the group as a field of `slime.config.Config`, and its dataclass."""

__all__ = [
    "GROUPS",
    "AlgorithmConfig",
    "AsyncConfig",
    "BatchConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "CorrectionConfig",
    "DataConfig",
    "DebugConfig",
    "DistillationConfig",
    "EngineConfig",
    "EvalConfig",
    "FaultToleranceConfig",
    "LoggingConfig",
    "NetworkConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainConfig",
    "WeightSyncConfig",
]
