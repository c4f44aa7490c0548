"""What is shown of a machine is made anew exactly if the claim, the status or its host's life changed."""

from __future__ import annotations

from unittest import mock

import pytest

from flyd.api import machine_cache
from flyd.api.machine_cache import ShownMachines
from flyd.api.machine_lists import Entry
from flyd.model import Machine, MachineState, MachineStatus
from flyd.store.mirror import Versioned
from tests.support.placing import make_host, make_machine

CLAIM = make_machine("m1", make_host("ams-1"))


def entry(revision: int = 1, said: MachineState | None = None, said_at: int = 2, name: str = "m1") -> Entry:
    claim = Versioned[Machine](name, CLAIM, revision)
    if said is None:
        return claim, None
    status = MachineStatus(id="m1", app="chat", host="ams-1", instance_id="Im1", epoch=1, state=said)
    return claim, Versioned[MachineStatus](name, status, said_at)


def test_only_a_change_makes_it_anew() -> None:
    alive = True
    shown = ShownMachines(lambda _host: alive)
    first = shown.show(entry())
    assert shown.show(entry()) is first
    assert shown.show(entry(revision=2)) is not first
    assert shown.show(entry(2, MachineState.STARTED)).state == "started"
    assert shown.show(entry(2, MachineState.STOPPED, said_at=3)).state == "stopped"
    assert shown.show(entry(2, MachineState.STOPPED, said_at=3)).host_status == "ok"
    alive = False
    assert shown.show(entry(2, MachineState.STOPPED, said_at=3)).host_status == "unreachable"
    assert shown.show(entry(2)).state == "created"


def test_it_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_cache, "MAX_KEPT", 3)
    shown = ShownMachines(lambda _host: True)
    with mock.patch.object(machine_cache.views, "machine", wraps=machine_cache.views.machine) as made:
        for name in ("a", "b", "c", "a", "b", "c", "d", "d"):
            shown.show(entry(name=name))
        assert made.call_count == 4
        shown.show(entry(name="a"))
        assert made.call_count == 5
