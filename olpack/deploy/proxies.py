"""Proxies of the environment that httpx needs another package for: SOCKS. A server on this machine is called without any."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def socks_proxies() -> dict[str, str]:
    """The environment's variables that name a SOCKS proxy, `{"ALL_PROXY": "socks5h://127.0.0.1:9"}`."""
    return {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy") and value.lower().startswith("socks")}


@contextmanager
def without_socks() -> Iterator[None]:
    """An environment without them, for a package that makes a client of its own while it is imported."""
    hidden = socks_proxies()
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
