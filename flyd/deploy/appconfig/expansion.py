"""From an AppConfig to the machines that it asks for. Pure; called by the deployer.

What depends on the machine (FLY_* and PRIMARY_REGION, PORT, secrets) is added on its
host, by flyd/machines/environment.py.
"""

from __future__ import annotations

from flyd.deploy.appconfig.values import AppConfig
from flyd.errors import NotFound
from flyd.model import MachineConfig, RestartPolicy

RELEASE_COMMAND_GROUP = "fly_app_release_command"  # Fly's name for the group of such machines


def process_groups(config: AppConfig) -> tuple[str, ...]:
    """The names of the app's process groups, the default one first."""
    return tuple(config.groups)


def machine_config(config: AppConfig, group: str, image: str) -> MachineConfig:
    """What one machine of `group` is to be, running `image`."""
    if group not in config.groups:
        raise NotFound(
            f"fly.toml of app {config.app!r} has no process group {group!r}",
            hint=f"its groups: {', '.join(config.groups)}",
        )
    wanted = config.groups[group]
    return MachineConfig(
        image=image,
        cmd=wanted.command,
        env=config.env,
        guest=wanted.guest,
        services=wanted.services,
        checks=wanted.checks,
        mounts=wanted.mounts,
        restart=wanted.restart,
        stop=config.stop,
        metadata=_metadata(group),
        process_group=group,
        host_labels=wanted.host_labels,
    )


def release_machine_config(config: AppConfig, image: str) -> MachineConfig:
    """The machine that runs the release command once. Call only if there is a release command."""
    default = config.groups[process_groups(config)[0]]
    return MachineConfig(
        image=image,
        cmd=config.deploy.release_command,
        env={**config.env, "RELEASE_COMMAND": "1"},
        guest=config.deploy.release_command_guest or default.guest,
        restart=RestartPolicy(policy="no"),
        stop=config.stop,
        metadata=_metadata(RELEASE_COMMAND_GROUP),
        auto_destroy=True,
        process_group=RELEASE_COMMAND_GROUP,
        host_labels=default.host_labels,
    )


def _metadata(group: str) -> dict[str, str]:
    return {"fly_platform_version": "v2", "fly_process_group": group}
