"""Sends metrics to Weights & Biases, for runs that ask with --use-wandb; the package is imported only then."""

import argparse
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUN_ID_FILE = "wandb_run_id.txt"


class WandbAdapter:
    """One W&B run. Its id is kept in the run's folder, so that a resumed run goes on in the same W&B run."""

    def __init__(self, args: argparse.Namespace, run_dir: Path, wandb: Any = None) -> None:
        self._wandb = wandb if wandb is not None else _import_wandb()
        if host := getattr(args, "wandb_host", None):
            self._wandb.login(key=getattr(args, "wandb_key", None), host=host)
        elif key := getattr(args, "wandb_key", None):
            self._wandb.login(key=key)
        run_id = _run_id(args, run_dir)
        self._run = self._wandb.init(
            project=getattr(args, "wandb_project", None) or "slime",
            entity=getattr(args, "wandb_team", None),
            group=getattr(args, "wandb_group", None),
            name=_run_name(args, run_dir),
            id=run_id,
            resume="allow",
            mode=getattr(args, "wandb_mode", None),
            dir=getattr(args, "wandb_dir", None) or str(run_dir),
            config=_plain_config(args),
        )
        args.wandb_run_id = run_id
        for room in ("rollout", "train", "eval"):
            self._run.define_metric(f"{room}/step")
            self._run.define_metric(f"{room}/*", step_metric=f"{room}/step")
        for room in ("perf", "passrate", "multi_turn"):
            self._run.define_metric(f"{room}/*", step_metric="rollout/step")

    def log(self, data: Mapping[str, float], step: int) -> None:
        """Args: data: values by name. step: the x-value of every room that does not bring its own."""
        steps = {f"{room}/step": step for room in ("rollout", "train", "eval")}
        self._run.log(steps | dict(data))

    def finish(self) -> None:
        self._run.finish()


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            f"--use-wandb needs the package wandb ({error}). Install it with `pip install wandb`, or drop the flag: "
            "TensorBoard files and metrics.jsonl are written without it."
        ) from error
    return wandb


def _run_id(args: argparse.Namespace, run_dir: Path) -> str:
    """--wandb-run-id, else the id that this run's folder remembers, else a new one, remembered."""
    path = run_dir / RUN_ID_FILE
    given = getattr(args, "wandb_run_id", None)
    run_id = given or (path.read_text(encoding="utf-8").strip() if path.exists() else secrets.token_hex(4))
    path.write_text(f"{run_id}\n", encoding="utf-8")
    return run_id


def _run_name(args: argparse.Namespace, run_dir: Path) -> str:
    group = getattr(args, "wandb_group", None) or run_dir.name
    return f"{group}-{secrets.token_hex(3)}" if getattr(args, "wandb_random_suffix", False) else group


_KEYS = ("wandb_key", "api_key", "api_keys")


def _plain_config(args: argparse.Namespace) -> dict[str, Any]:
    """What W&B may show of the arguments: plain values, and no key to an account or a server."""
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    return {k: v for k, v in sorted(vars(args).items()) if isinstance(v, plain) and not k.endswith(_KEYS)}
