"""One host's private network as a process of its own, for a namespace of its own.

    ip netns exec HOST python -m tests.support.mesh_process INTERFACE KEY_FILE MODE

reads a Host from its first line of input, prints it with its public key, and then keeps mesh,
firewall and DNS by what it reads: lines of `key value` are put into a store of its own.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from flyd.model import Host, decode, encode
from flyd.network.dns import DnsServer
from flyd.network.mesh import keep_mesh
from flyd.network.mesh_plan import MeshMode
from flyd.network.nftables import Nftables, keep_firewall
from flyd.network.wireguard import WireguardLink
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from flyd.store.mirror import Mirror
from flyd.store.system import SystemClock, SystemEntropy

DNS_PORT = 53


async def main(interface: str, key_file: Path, mode: MeshMode) -> None:
    link = WireguardLink(key_file, interface=interface)
    host = decode((await read_line()).encode(), Host)
    if mode is MeshMode.WIREGUARD:
        host = msgspec.structs.replace(host, wg_public_key=await link.public_key())
    print(encode(host).decode(), flush=True)
    kv = MemoryKV(MemoryEtcd())
    mirror = Mirror(kv, (keys.ROOT,))
    names = DnsServer(host, mirror, kv, clock=SystemClock(), entropy=SystemEntropy(), port=DNS_PORT)
    async with asyncio.TaskGroup() as group:
        group.create_task(mirror.keep())
        group.create_task(keep_mesh(host, mirror, link, mode))
        group.create_task(keep_firewall(host, mirror, Nftables(interface, DNS_PORT)))
        group.create_task(names.serve())
        while line := await read_line():
            key, _, value = line.strip().partition(" ")
            await kv.put(key, value.encode())
        raise KeyboardInterrupt


async def read_line() -> str:
    return await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), MeshMode(sys.argv[3])))
