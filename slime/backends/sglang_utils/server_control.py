"""Alias of `slime.utils.server_control`, at the path that existing plug-ins import."""

from slime.utils.server_control import abort_server_until_idle, abort_servers_until_idle, num_requests_from_load

__all__ = ["abort_server_until_idle", "abort_servers_until_idle", "num_requests_from_load"]
