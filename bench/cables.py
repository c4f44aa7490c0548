"""Cutting a member of bench/failover.py off without a word: its packets vanish, nothing resets a connection.

The members share the loopback network of one machine, so the kernel's packet filter does it, in a table of
our own. A member is known by two things: the address that it listens at, and the group id that it was
started with, which marks every connection that it opens itself (to etcd, to the other members). Cut, what
comes in on either is dropped. Dropped where it arrives, not where it is sent: the sender notices nothing.

Needs root and `nft`. The table goes at the end, also after an error; one left by a run that was killed goes
at the next start.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

PREFIX = "bench_failover_"  # and our process id
TABLE = f"inet {PREFIX}{os.getpid()}"
FIRST_GROUP = 49_001  # nobody's: only the number matters
NFT_S = 10.0


def why_not() -> str:
    """Why nothing can be cut here; empty if it can."""
    if os.geteuid() != 0:
        return "only root may drop packets"
    if shutil.which("nft") is None:
        return "there is no nft here (apt-get install nftables)"
    return ""


def groups(members: Iterable[str]) -> dict[str, int]:
    """The group that each member is to be started with."""
    return {name: FIRST_GROUP + number for number, name in enumerate(members)}


class Cables:
    """What connects each member with all others."""

    def __init__(self, addresses: dict[str, str], members: dict[str, int]) -> None:
        self._ips = {name: address.rpartition(":")[0] for name, address in addresses.items()}
        self._groups = members

    def cut(self, node: str) -> None:
        """From now on nothing reaches it or comes from it."""
        _nft(
            f"add element {TABLE} addresses {{ {self._ips[node]} }}\n"
            f"add element {TABLE} openers {{ {self._groups[node]} }}\n"
        )

    def mend(self) -> None:
        """All are connected again."""
        _nft(f"flush set {TABLE} addresses\nflush set {TABLE} openers\n")

    def rules(self) -> str:
        """The table while nobody is cut."""
        marks = "\n".join(
            f"    meta skgid {group} ct direction original ct mark set {group}"
            for group in sorted(self._groups.values())
        )
        return f"""table {TABLE} {{
  set addresses {{ type ipv4_addr; }}
  set openers {{ type mark; }}
  chain opened {{
    type filter hook output priority 0; policy accept;
{marks}
  }}
  chain arriving {{
    type filter hook input priority 0; policy accept;
    ct mark @openers drop
    ip saddr @addresses drop
    ip daddr @addresses drop
  }}
}}
"""


@contextmanager
def laid(cables: Cables) -> Generator[None]:
    """Cables that can be cut, while the block runs."""
    remove_leftovers()
    _nft(cables.rules())
    try:
        yield
    finally:
        _nft(f"delete table {TABLE}\n")


def remove_leftovers() -> None:
    """The tables of runs that were killed."""
    listed = subprocess.run(
        ["nft", "list", "tables"], capture_output=True, text=True, check=True, timeout=NFT_S
    )
    for pid in re.findall(rf"^table inet {PREFIX}(\d+)$", listed.stdout, re.MULTILINE):
        if not Path(f"/proc/{pid}").exists():
            _nft(f"delete table inet {PREFIX}{pid}\n")


def _nft(text: str) -> None:
    """One transaction of the packet filter."""
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True, timeout=NFT_S)
