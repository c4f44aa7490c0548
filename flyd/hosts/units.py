"""The systemd units of a host: what starts flyd, and on a voter etcd, at boot and after a crash. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from flyd.errors import Refused

UNIT_FOLDER = Path("/etc/systemd/system")
BOOTED = Path("/run/systemd/system")  # there where systemd runs: sd_booted(3)


def flyd_unit(program: str, config: Path) -> str:
    """flyd. Stopping it stops no machine, nor Envoy: only its own process is signalled.

    It is not started again after a refusal (flyd/errors.py: its exit code), which a restart
    would only repeat: an expelled host, a data directory that another flyd holds.
    """
    return f"""[Unit]
Description=flyd, which runs this host's machines
After=network-online.target docker.service etcd.service
Wants=network-online.target

[Service]
ExecStart={program} --config {config}
Restart=always
RestartSec=1
RestartPreventExitStatus={Refused.exit_code}
KillMode=process
LimitNOFILE=1048576
TasksMax=infinity
Delegate=yes

[Install]
WantedBy=multi-user.target
"""


def etcd_unit(command: Sequence[str]) -> str:
    """This host's member of etcd."""
    return f"""[Unit]
Description=etcd, the memory of the flyd cluster
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
ExecStart={shlex.join(command)}
Restart=always
RestartSec=1
LimitNOFILE=65536

[Install]
WantedBy=multi-user.target
"""
