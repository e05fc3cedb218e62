"""SGLang servers that somebody else started, at `--rollout-external-engine-addrs`: found out about and checked."""

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from slime.backends.base import EngineSpec
from slime.backends.sglang.client import SGLangClient
from slime.utils.http_utils import _wrap_ipv6
from slime.weight_sync.base import EngineError

OLDEST_SGLANG = (0, 5, 16)
_ASK_TIMEOUT_S = 30.0


def external_name(index: int) -> str:
    """How logs and errors call the engine."""
    return f"external engine {index}"


def normalized(address: str) -> tuple[str, int]:
    """(host, port) of `host:port` or `http://host:port`; the host of an IPv6 address without its brackets."""
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.hostname is None or parts.port is None:
        raise ValueError(f"{address} is not host:port.")
    return parts.hostname, parts.port


def find_external(args: Namespace, index: int, address: str, weights_dir: Path) -> EngineSpec:
    """What runs at `address`, as a spec.

    Raises:
        EngineError: nothing answers there, or it is no SGLang that can be used; names the engine and its address.
    """
    host, port = normalized(address)
    client = SGLangClient(f"http://{_wrap_ipv6(host)}:{port}", external_name(index), timeout_s=_ASK_TIMEOUT_S)
    try:
        info, model = client.server_info(), client.model_info()
    finally:
        client.close()
    _check(args, client, info, model)
    kind = str(info.get("disaggregation_mode") or "null")
    tp = int(info.get("tp_size") or info.get("tensor_parallel_size") or 1)
    pp = int(info.get("pp_size") or info.get("pipeline_parallel_size") or 1)
    return EngineSpec(
        index=index,
        host=_wrap_ipv6(host),
        port=port,
        num_devices=tp * pp,
        device=str(info.get("device") or args.device),
        device_ids=(),
        model_path=str(info.get("model_path") or model.get("model_path") or ""),
        dtype=str(info.get("dtype") or "auto"),
        threads=0,
        log_path=Path("/dev/null"),
        weights_dir=weights_dir,
        seed=0,
        worker_type="regular" if kind == "null" else kind,
        bootstrap_port=int(info.get("disaggregation_bootstrap_port") or 0) if kind == "prefill" else 0,
    )


def _check(args: Namespace, client: SGLangClient, info: dict[str, Any], model: dict[str, Any]) -> None:
    version = str(info.get("version") or "")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if info.get("version") is None or (numbers < OLDEST_SGLANG and "embedded" not in version):
        oldest = ".".join(map(str, OLDEST_SGLANG))
        raise EngineError(
            f"{client.name} ({client.url}) says that it is SGLang {version or 'of no version'}; weights can be sent to "
            f"{oldest} or newer. Start one there, or let slime start its engines."
        )
    config = json.loads((Path(args.hf_checkpoint) / "config.json").read_text(encoding="utf-8"))
    for key in ("model_type", "architectures"):
        if model.get(key) and config.get(key) and model[key] != config[key]:
            raise EngineError(
                f"{client.name} ({client.url}) serves {model.get('model_path')}, whose {key} is {model[key]}; "
                f"--hf-checkpoint {args.hf_checkpoint} has {config[key]}. Start it with the model that is trained."
            )
