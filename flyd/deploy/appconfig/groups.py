"""Process groups: which there are, and which group a section belongs to.

Without `[processes]` there is one group, `app`. The default group is `app`, else the
first by name. A section that names no group belongs to the default one; a service must
name its groups once `[processes]` exists, as Fly demands. Used by the sections.
"""

from __future__ import annotations

import msgspec

from flyd.deploy.appconfig.table import Table
from flyd.deploy.appconfig.values import DEFAULT_GROUP


class Groups(msgspec.Struct, frozen=True):
    """The groups' names, the default one first; `declared` if the file has `[processes]`."""

    names: tuple[str, ...]
    declared: bool = False

    @property
    def default(self) -> str:
        """The group of sections that name none."""
        return self.names[0]

    def of_service(self, section: Table) -> tuple[str, ...]:
        """The groups of a service."""
        if self.declared and not section.strings("processes"):
            section.error(
                "processes",
                f"the service names no process group, but the app has {', '.join(self.names)}:"
                f" add processes = [{self.default!r}]",
            )
        return self.of(section)

    def of(self, section: Table) -> tuple[str, ...]:
        """The groups that a section belongs to; the default one if it names none."""
        named = section.strings("processes")
        unknown = [name for name in named if name not in self.names]
        if unknown:
            section.error(
                "processes", f"there is no process group {unknown[0]!r}, only {', '.join(self.names)}"
            )
        known = tuple(name for name in named if name in self.names)
        return known if named else (self.default,)


def read_commands(root: Table) -> tuple[Groups, dict[str, tuple[str, ...]]]:
    """The groups, and the words of each group's command (none: the image's own)."""
    if not isinstance(root.values.get("processes", {}), dict):
        # The oldest form: an array of {name, command}; often empty, and then it means nothing.
        commands = {entry.text("name"): entry.command("command") for entry in root.tables("processes")}
    else:
        table = root.table("processes")
        commands = {name: table.command(name) for name in table.values}
    if not commands:
        return Groups((DEFAULT_GROUP,)), {DEFAULT_GROUP: ()}
    names = sorted(commands, key=lambda name: (name != DEFAULT_GROUP, name))
    return Groups(tuple(names), declared=True), commands
