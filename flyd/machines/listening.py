"""Whether somebody listens where a machine's services say. Pure; called by the API (`ps`).

A service on a port that nobody listens on, or only on the loopback address, gets no requests: the
most common mistake of a first deploy, and one that checks only show as "connection refused".
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from flyd.model import MachineConfig
from flyd.model.machine import ListenSocket, Process


def unheard_services(config: MachineConfig, address: str, processes: Sequence[Process]) -> list[str]:
    """A warning for each service that is not listened for at the machine's address."""
    sockets = [socket for process in processes for socket in process.listens]
    warnings: list[str] = []
    for service in config.services:
        on_port = [
            s for s in sockets if s.port == service.internal_port and s.protocol.startswith(service.protocol)
        ]
        if any(_reaches(socket, address) for socket in on_port):
            continue
        where = f"port {service.internal_port}"
        if on_port:
            only = ", ".join(sorted({socket.address for socket in on_port}))
            warnings.append(f"{where} is listened on at {only} alone: requests come to 0.0.0.0 or {address}")
        else:
            warnings.append(f"nothing listens on {where} ({service.protocol}), a service's internal port")
    return warnings


def _reaches(socket: ListenSocket, address: str) -> bool:
    listens = ipaddress.ip_address(socket.address)
    if listens.is_unspecified:
        return True
    if isinstance(listens, ipaddress.IPv6Address) and listens.ipv4_mapped is not None:
        return listens.ipv4_mapped.is_unspecified or str(listens.ipv4_mapped) == address
    return str(listens) == address
