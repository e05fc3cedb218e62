"""Where the ranks of a process group meet: a store that listens on one address, not on every interface."""

import os
import socket
from datetime import timedelta
from ipaddress import ip_address

import torch.distributed as dist


def tcp_store(address: str, port: int, *, rank: int, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """Rank 0 serves the store at `address`; the others connect to it. (By itself torch's store listens everywhere.)

    Returns when all ranks have connected.

    Raises:
        OSError: rank 0 cannot listen there.
        torch.distributed.DistError: not all ranks came within `timeout`.
    """
    listener = _listen(address, port) if rank == 0 else None
    return dist.TCPStore(
        address,
        port,
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=None if listener is None else listener.detach(),
    )


def connect(address: str, port: int, *, timeout: timedelta) -> dist.TCPStore:
    """One more connection to the store of `tcp_store`, of this process's own.

    Args:
        timeout: of each request.
    """
    return dist.TCPStore(address, port, is_master=False, timeout=timeout)


def keep_gloo_on(address: str) -> None:
    """Where ranks meet on loopback, have gloo's connections between them there too; GLOO_SOCKET_IFNAME goes first.

    (By itself gloo listens on the address that the host's name has.)
    """
    if is_loopback(address) and (interface := _loopback_interface()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def is_loopback(address: str) -> bool:
    """Whether only processes of this machine can connect to an address (a number, or `localhost`)."""
    try:
        return address == "localhost" or ip_address(address).is_loopback
    except ValueError:
        return False


def _loopback_interface() -> str | None:
    """`lo` on Linux, `lo0` on a Mac."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def _listen(address: str, port: int) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener
