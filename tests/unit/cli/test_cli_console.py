"""Which machine `fly console` takes, and what it refuses before it asks flyd."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from flyd.cli.console import choose
from flyd.cli.main import fly
from flyd.errors import InvalidInput, Refused
from flyd.v1 import machines_pb2


def machine(name: str, region: str, state: str = "started", host: str = "ok") -> machines_pb2.Machine:
    return machines_pb2.Machine(id=name, region=region, state=state, host_status=host)


MACHINES = (
    machine("c", "sin"),
    machine("b", "ams"),
    machine("a", "iad", "stopped"),
    machine("0", "ams", host="unreachable"),
)


@pytest.mark.parametrize(("region", "chosen"), [("", "b"), ("ams", "b"), ("sin", "c")])
def test_a_started_machine_is_chosen(region: str, chosen: str) -> None:
    assert choose(MACHINES, region) == chosen


@pytest.mark.parametrize(
    ("machines", "region", "hint"), [(MACHINES, "iad", "Started: ams, sin"), (MACHINES[2:], "", "nowhere")]
)
def test_without_one_it_says_where_there_are_some(
    machines: tuple[machines_pb2.Machine, ...], region: str, hint: str
) -> None:
    with pytest.raises(Refused, match="no started machine") as raised:
        choose(machines, region)
    assert hint in raised.value.hint


def test_words_that_make_no_sense() -> None:
    ran = CliRunner().invoke(fly, ["console", "--machine", "m", "-C", "echo 'open"])
    assert isinstance(ran.exception, InvalidInput)
    ran = CliRunner().invoke(fly, ["console", "--machine", "m", "--region", "sin"])
    assert ran.exit_code == 2
