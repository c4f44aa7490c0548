"""Hosts of the private network for tests, with few words."""

from __future__ import annotations

import msgspec

from flyd.model import Host
from tests.support import edge as values


def host(
    name: str, number: int, address: str = "", *, key: str = "key", beneath: str = "", driver: str = "process"
) -> Host:
    """The host with subnet 10.number and a tunnel at `beneath`, or without one if `key` is empty."""
    made = values.host("ams", address=address or f"10.{number}.0.1")
    endpoint = f"{beneath or f'192.0.2.{number}'}:51820" if key else ""
    return msgspec.structs.replace(
        made, driver=driver, name=name, subnet=f"10.{number}", wg_public_key=key, wg_endpoint=endpoint
    )
