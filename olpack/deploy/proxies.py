"""Proxies of the environment that httpx needs another package for: SOCKS. A server on this machine is called without any."""

from __future__ import annotations

import os


def socks_proxies() -> dict[str, str]:
    """The environment's variables that name a SOCKS proxy, `{"ALL_PROXY": "socks5h://127.0.0.1:9"}`."""
    return {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy") and value.lower().startswith("socks")}
