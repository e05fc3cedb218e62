"""The key that a run's engines and router ask for, and to whom slime may show it.

`--sglang-api-key KEY`, or the environment variable SLIME_API_KEY, which other users of the machine cannot read where
they can read command lines. It goes to servers of the run alone: reward services and whatever else plug-ins call do
not get it.
"""

import os
from argparse import Namespace
from urllib.parse import urlsplit

KEY_VARIABLE = "SLIME_API_KEY"

ADMIN_VARIABLE = "SLIME_ADMIN_API_KEY"
"""The key that SGLang asks for, if it has one, before it pauses, flushes, aborts or takes weights."""

_own_servers: set[str] = set()
"""`host:port` of the run's router and engines."""


def api_key(args: Namespace | None = None) -> str | None:
    """The run's key; None where its servers ask for none."""
    return getattr(args, "sglang_api_key", None) or os.environ.get(KEY_VARIABLE) or None


def admin_key(args: Namespace | None = None) -> str | None:
    """`--sglang-admin-api-key`, or SLIME_ADMIN_API_KEY; None where engines need no other key to be controlled, as the
    embedded one never does."""
    if getattr(args, "rollout_engine", None) == "embedded":
        return None
    return getattr(args, "sglang_admin_api_key", None) or os.environ.get(ADMIN_VARIABLE) or None


def take_api_key(args: Namespace) -> None:
    """Put the keys of the flags into this process's environment, for its clients and its children."""
    if key := api_key(args):
        os.environ[KEY_VARIABLE] = key
    if admin := admin_key(args):
        os.environ[ADMIN_VARIABLE] = admin
    else:
        os.environ.pop(ADMIN_VARIABLE, None)


def key_environment(args: Namespace | None = None) -> dict[str, str]:
    """What a server of the run needs in its environment to ask for the key."""
    key = api_key(args)
    return {KEY_VARIABLE: key} if key else {}


def key_header(key: str | None) -> dict[str, str]:
    """The header that shows a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def control_header() -> dict[str, str]:
    """The header of calls that change what an engine does."""
    return key_header(admin_key() or api_key())


def is_own_server(*urls: str) -> None:
    """Requests to these servers carry the key from now on."""
    _own_servers.update(urlsplit(url).netloc for url in urls)


def headers_for(url: str, headers: dict[str, str] | None) -> dict[str, str] | None:
    """`headers` with the key if `url` is of the run's own servers; the caller's own Authorization stays."""
    if urlsplit(url).netloc not in _own_servers or not (key := api_key()):
        return headers
    return key_header(key) | (headers or {})
