"""Sections about machines and their replacement: `env`, `vm`, `mounts`, `restart`, `kill_*`, `deploy`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec.structs import replace

from flyd.deploy.appconfig.groups import Groups
from flyd.deploy.appconfig.table import Table
from flyd.deploy.appconfig.values import (
    DEFAULT_MAX_UNAVAILABLE,
    DEFAULT_RELEASE_COMMAND_TIMEOUT_S,
    DEFAULT_WAIT_TIMEOUT_S,
    DeployPolicy,
)
from flyd.errors import InvalidInput
from flyd.model import Guest, Mount, RestartPolicy, StopConfig, VolumeRule, labels
from flyd.storage.copies import MAX_REPLICAS, check_policy
from flyd.storage.recovery_rule import check_rule

STRATEGIES = ("rolling", "immediate", "canary", "bluegreen")
STRATEGIES_WITH_SECOND_MACHINE = ("canary", "bluegreen")  # which would need the same volume
KILL_SIGNALS = ("SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL")
MAX_KILL_TIMEOUT_S = 300.0
RESTART_POLICIES = {"always": "always", "on-failure": "on-failure", "on-fail": "on-failure", "never": "no"}
MAX_RETRIES = 1000

PRESET = re.compile(r"(shared-cpu|performance)-(\d+)x")
PRESET_CPUS = {"shared-cpu": (1, 2, 4, 6, 8), "performance": (1, 2, 4, 6, 8, 10, 12, 14, 16)}
PRESET_MEMORY_MB = {"shared-cpu": 256, "performance": 2048}  # for each CPU
CPU_KINDS = {"shared-cpu": "shared", "performance": "performance"}
DEFAULT_PRESET = "shared-cpu-1x"
MAX_CPUS, MAX_MEMORY_MB = 1024, 16 * 1024 * 1024

VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
MIN_VOLUME_GB = 1
# Keys of a mount that flyd does not act on yet, and the bounds that Fly demands of them.
MOUNT_BOUNDS = {"snapshot_retention": (1, 60), "auto_extend_size_threshold": (50, 99)}
MOUNT_SIZE_BOUNDS_GB = {"auto_extend_size_increment": (1, 100), "auto_extend_size_limit": (1, 500)}


def read_env(root: Table) -> dict[str, str]:
    """The environment, every value as text; of an array of tables the last wins."""
    env: dict[str, str] = {}
    for table in root.tables("env"):
        for name, value in table.values.items():
            if not isinstance(value, str | int | float):
                table.error(name, "expected a string, number or boolean")
            if name.startswith("FLY_"):
                table.warn(name, "names starting with FLY_ belong to flyd, which may set another value")
            env[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return env


def read_guests(root: Table, groups: Groups) -> dict[str, Guest]:
    """The size of each group's machines: its own `vm`, else the one that names no group."""
    general = Guest()
    special: dict[str, Guest] = {}
    for section in root.tables("vm", "compute", "computes"):
        guest = _guest(section)
        named = section.strings("processes")
        if not named:
            general = guest
        for name in named:
            special[name] = guest
            if name not in groups.names:
                section.warn("processes", f"there is no process group {name!r}")
    return {name: special.get(name, general) for name in groups.names}


def read_mounts(root: Table, groups: Groups) -> dict[str, tuple[Mount, ...]]:
    """The mount of each group: one at most."""
    found: dict[str, tuple[Mount, ...]] = dict.fromkeys(groups.names, ())
    sections = root.tables("mounts", "mount")
    rules = _volume_rules(root, [section.text("source") for section in sections])
    for section in sections:
        mount = _mount(section)
        mount = replace(mount, rule=rules.get(mount.name))
        for group in groups.of(section):
            if found[group]:
                section.error(
                    "source", f"process group {group!r} has a mount already: a machine has one volume"
                )
            found[group] = (mount,)
    return found


def read_restarts(root: Table, groups: Groups) -> dict[str, RestartPolicy]:
    """The restart policy of each group; the last section that names it wins."""
    found = {name: RestartPolicy() for name in groups.names}
    for section in root.tables("restart"):
        policy = section.one_of("policy", tuple(RESTART_POLICIES), "on-failure")
        retries = section.integer("retries", RestartPolicy().max_retries, minimum=0, maximum=MAX_RETRIES)
        for group in groups.of(section):
            found[group] = RestartPolicy(policy=RESTART_POLICIES[policy], max_retries=retries)
    return found


def read_requirements(root: Table, groups: Groups) -> dict[str, dict[str, str]]:
    """The labels that the hosts of each group's machines must have: all groups' and its own."""
    section = root.table("flyd").table("require")
    names = [name for name, value in section.values.items() if not isinstance(value, dict)]
    general = _labels(section, names)
    found = {name: dict(general) for name in groups.names}
    for group in (name for name in section.values if name not in names):
        if group not in groups.names:
            section.error(group, f"there is no process group {group!r}, only {', '.join(groups.names)}")
            continue
        own = section.table(group)
        found[group].update(_labels(own, list(own.values)))
    return found


def _labels(section: Table, names: list[str]) -> dict[str, str]:
    for name in names:
        against = labels.wrong_name(name)
        value = section.text(name)
        if isinstance(section.values[name], str):
            against = against or labels.wrong_value(value)
        if against:
            section.error(name, against)
    if len(names) > labels.MAX_LABELS:
        section.error(names[-1], f"{len(names)} labels are too many: at most {labels.MAX_LABELS}")
    return {name: section.text(name) for name in names}


def read_stop(root: Table) -> StopConfig:
    """How machines are asked to end. A bare kill_timeout is seconds."""
    signal = root.text("kill_signal").upper() or StopConfig().signal
    if signal not in KILL_SIGNALS:
        root.error("kill_signal", f"{signal!r} is not one of {', '.join(KILL_SIGNALS)}")
    section = root if "kill_timeout" in root else root.table("experimental")
    timeout_s = section.duration_s("kill_timeout", StopConfig().timeout_s)
    if timeout_s > MAX_KILL_TIMEOUT_S:
        section.warn("kill_timeout", f"{timeout_s:g} s is too long: {MAX_KILL_TIMEOUT_S:g} s is used")
    return StopConfig(signal=signal, timeout_s=min(timeout_s, MAX_KILL_TIMEOUT_S))


def read_deploy(root: Table, has_mounts: bool) -> DeployPolicy:
    """How a deploy goes. Fly reads a bare number in these durations as nanoseconds; we, as seconds."""
    section = root.table("deploy")
    strategy = section.one_of("strategy", STRATEGIES, "rolling")
    if has_mounts and strategy in STRATEGIES_WITH_SECOND_MACHINE:
        section.error("strategy", f"{strategy} starts a second machine, which can not have the same volume")
    elif strategy in STRATEGIES_WITH_SECOND_MACHINE:
        section.warn("strategy", f"flyd does not know {strategy} yet: it deploys rolling, new machines first")
    guests = [_guest(vm) for vm in section.tables("release_command_vm")]
    return DeployPolicy(
        strategy=strategy,
        release_command=section.command("release_command"),
        release_command_timeout_s=section.duration_s(
            "release_command_timeout", DEFAULT_RELEASE_COMMAND_TIMEOUT_S
        ),
        release_command_guest=guests[0] if guests else None,
        wait_timeout_s=section.duration_s("wait_timeout", DEFAULT_WAIT_TIMEOUT_S),
        max_unavailable=section.number("max_unavailable", DEFAULT_MAX_UNAVAILABLE),
    )


def _guest(section: Table) -> Guest:
    preset = _preset(section)
    memory_mb = section.memory_mb("memory") or preset.memory_mb
    return Guest(
        cpus=section.integer("cpus", preset.cpus, minimum=1, maximum=MAX_CPUS),
        memory_mb=section.integer("memory_mb", memory_mb, minimum=1, maximum=MAX_MEMORY_MB),
        cpu_kind=section.one_of("cpu_kind", tuple(CPU_KINDS.values()), preset.cpu_kind),
    )


def _preset(section: Table) -> Guest:
    size = section.text("size") or DEFAULT_PRESET
    match = PRESET.fullmatch(size)
    if match is None or int(match[2]) not in PRESET_CPUS[match[1]]:
        known = ", ".join(f"{kind}-{{{','.join(map(str, cpus))}}}x" for kind, cpus in PRESET_CPUS.items())
        section.error("size", f"{size!r} is not a size that flyd has: {known}")
        return Guest()
    cpus = int(match[2])
    return Guest(cpus=cpus, memory_mb=cpus * PRESET_MEMORY_MB[match[1]], cpu_kind=CPU_KINDS[match[1]])


def _volume_rules(root: Table, names: Sequence[str]) -> dict[str, VolumeRule]:
    """How the volumes of each name are copied and come back: `flyd.volumes`, a table of our own."""
    table, rules = root.table("flyd").table("volumes"), dict[str, VolumeRule]()
    for name in table.values:
        if name not in names:
            table.error(name, f"no mount has the source {name!r}")
            continue
        section = table.table(name)
        rule = VolumeRule(
            replicas=section.integer("replicas", 1, minimum=0, maximum=MAX_REPLICAS),
            copy_every_s=section.duration_s("every", VolumeRule(replicas=1).copy_every_s),
            recover_max_age_s=section.duration_s("recover_within", 0.0),
        )
        try:
            check_policy(rule.replicas, rule.copy_every_s)
            check_rule(rule.recover_max_age_s, rule.replicas)
        except InvalidInput as error:
            table.error(name, error.message)
        rules[name] = rule
    return rules


def _mount(section: Table) -> Mount:
    source = section.text("source")
    if VOLUME_NAME.fullmatch(source) is None:
        section.error("source", f"{source!r} is not a name of a volume (letters, digits, _ and -)")
    path = section.text("destination")
    parts = path.split("/")
    if not path.startswith("/") or not path.strip("/") or ".." in parts:
        section.error("destination", f"{path!r} is not an absolute path below /")
    size_gb = section.disk_gb("initial_size")
    if size_gb is not None and size_gb < MIN_VOLUME_GB:
        section.error("initial_size", f"a volume has at least {MIN_VOLUME_GB} GB")
    for key, (low, high) in MOUNT_BOUNDS.items():
        if key in section:
            section.integer(key, low, minimum=low, maximum=high)
    for key, (low, high) in MOUNT_SIZE_BOUNDS_GB.items():
        bounded_gb = section.disk_gb(key)
        if bounded_gb is not None and not low <= bounded_gb <= high:
            section.error(key, f"{bounded_gb} GB is not between {low} and {high} GB")
    return Mount(path="/" + path.strip("/"), name=source, size_gb=max(size_gb or 0, MIN_VOLUME_GB))
