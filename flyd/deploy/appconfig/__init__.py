"""fly.toml: read, judged and turned into machines.

`parse` gives an AppConfig or raises InvalidInput with the file, line and column;
`inspect` gives everything there is to say, for `fly config validate`; `process_groups`,
`machine_config` and `release_machine_config` say which machines the file asks for.
All of it is pure: text in, values out. The reference is Fly's own parser, with the
differences listed in `parse.py`.
"""

from flyd.deploy.appconfig.expansion import machine_config, process_groups, release_machine_config
from flyd.deploy.appconfig.parse import inspect, parse, remark_text
from flyd.deploy.appconfig.values import AppConfig, DeployPolicy, ProcessGroup, Remark, Report

__all__ = [
    "AppConfig",
    "DeployPolicy",
    "ProcessGroup",
    "Remark",
    "Report",
    "inspect",
    "machine_config",
    "parse",
    "process_groups",
    "release_machine_config",
    "remark_text",
]
