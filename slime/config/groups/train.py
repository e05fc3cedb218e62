"""Flags of the trainer: what is trained, how weights reach the engines, checkpoints, plug-in points of Megatron."""

from dataclasses import dataclass
from typing import Any, Literal

from slime.config.flags import flag


@dataclass(frozen=True)
class TrainConfig:
    """Training."""

    qwen_gdn_backend: Literal["fla", "flashqla"] = "fla"
    """Kernel of Qwen's gated-delta-net layers."""
    train_env_vars: dict[str, Any] = flag({})
    """Extra environment variables of the trainer's processes, as JSON."""
    release_train: bool = False
    """End the trainer's processes while generating and start them again for each training step."""
    custom_model_provider_path: str | None = None
    """Function (pre_process, post_process[, vp_stage]) that builds the model."""
    recompute_loss_function: bool = False
    """Recompute the loss function in the backward pass instead of keeping its activations."""
    log_probs_chunk_size: int = -1
    """Tokens for which logits exist at once when log-probs are computed; 0 or less: 4096 on GPUs, 512 on the CPU."""
    only_train_params_name_list: list[str] | None = None
    """Train only parameters whose name matches one of these regular expressions."""
    freeze_params_name_list: list[str] | None = None
    """Freeze parameters whose name matches one of these regular expressions."""
    freeze_indexer: bool = False
    """Freeze the indexer of sparse attention (DSA)."""
    allgather_cp: bool = False
    """Split the context contiguously and gather keys and values (models with sparse attention only)."""
    megatron_config_path: str | None = None
    """YAML with overrides for the roles actor and critic."""
    num_critic_only_steps: int = 0
    """Train only the critic for this many rollouts."""
    enable_mtp_training: bool = False
    """Train the multi-token-prediction layers too; needs --mtp-num-layers."""
    mtp_num_layers: int | None = None
    """Multi-token-prediction layers of the model."""
    mtp_loss_scaling_factor: float = 0.2
    """Weight of the multi-token-prediction loss."""
    padded_vocab_size: int | None = None
    """Rows of the embedding, padding included. Default: derived from the vocabulary and the tensor parallel size."""
    seed: int = 1234
    """Seed of the trainer."""
    clip_grad: float = 1.0
    """Largest global gradient norm."""
    lr: float = 1e-6
    """Learning rate."""
    reset_optimizer_states: bool = False
    """Clear the optimizer's state before each rollout is trained on."""
    use_stateless_adam: bool = False
    """Adam without moments; needs --optimizer adam and --no-save-optim."""
    custom_megatron_init_path: str | None = None
    """Function (args), called at the end of Megatron's initialisation."""
    custom_megatron_before_log_prob_hook_path: str | None = None
    """Function (args, model, store_prefix), called before every forward-only pass."""
    custom_megatron_before_train_step_hook_path: str | None = None
    """Function (args, rollout_id, step_id, model, optimizer, opt_param_scheduler), called before each step."""
    megatron_deepgemm_forward_layers: list[int] | None = None
    """Global layer ids whose forward pass uses the engines' FP8 kernels."""
    megatron_deepgemm_forward_modules: list[str] | None = None
    """Modules of these layers that do."""
    megatron_deepgemm_moe_forward_layers: list[int] | None = None
    """The same for mixture-of-experts layers."""
    megatron_deepgemm_moe_forward_modules: list[str] | None = None
    """Modules of these layers that do. Default: mlp.experts."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    load: str | None = None
    """Checkpoint to start from: Megatron format (resumes) or a HuggingFace folder. Default: this run's own newest
    checkpoint, else --ref-load, else --hf-checkpoint."""
    save: str | None = None
    """Folder for checkpoints. Default with --save-interval: <output-dir>/<run-name>/checkpoints."""
    save_interval: int | None = None
    """Rollouts between checkpoints."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy that takes as much of the host's memory as they have bytes."""
    no_save_optim: bool = False
    """Leave the optimizer's state out of checkpoints."""
    save_hf: str | None = None
    """Also export a HuggingFace folder with each checkpoint: a path with {rollout_id} in it."""
    ref_load: str | None = None
    """Reference model for KL terms (Megatron or HuggingFace). Default: what the actor starts from."""
    ref_ckpt_step: int | None = None
    """Iteration to load from a Megatron --ref-load. Default: the newest."""
    allow_pickle_checkpoints: bool = False
    """Also load Megatron checkpoints that hold more than plain data, which can run code: give it only where you trust
    who made them."""


@dataclass(frozen=True)
class WeightSyncConfig:
    """How new weights reach the engines."""

    update_weight_mode: Literal["full", "delta"] = "full"
    """Send whole weights, or only what changed."""
    update_weight_transport: Literal["nccl", "disk"] = "nccl"
    """nccl: through memory where trainer and engine share a device or a CPU's host, else a process group (NCCL, on CPUs
    gloo); disk: through files in --update-weight-disk-dir."""
    update_weight_buffer_size: int = 512 * 1024 * 1024
    """Size of one bucket of weights, in bytes."""
    update_weights_interval: int = 1
    """Rollouts between two weight syncs. Where engines give their memory back there is one after every rollout."""
    update_weight_disk_dir: str | None = None
    """Folder for weights that go through files, with --update-weight-transport disk; trainer and engines must see it
    under the same path."""
    update_weight_disk_keep_files: bool = False
    """Keep these files after the engines have read them."""
    update_weight_delta_encoding: Literal["xor", "overwrite"] = "xor"
    """How a changed value is written."""
    update_weight_delta_checksum: Literal["xxh3-128", "blake3", "adler32"] = "xxh3-128"
    """Checksum that proves a delta."""
    update_weight_local_checkpoint_dir: str | None = None
    """Folder on each engine's host with a HuggingFace checkpoint that is kept up to date by deltas."""
    custom_update_weight_post_write_path: str | None = None
    """Function (args, version_dir, rollout_engines), called after weight files are written."""
    check_weight_update_equal: bool = False
    """Accepted for older scripts: every sync compares every weight of every engine with the trainer's anyway."""
