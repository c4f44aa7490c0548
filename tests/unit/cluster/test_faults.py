"""What fill-disk and slow-link run in a host, and where they are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from click.testing import CliRunner

from flyd.cli.main import fly
from flyd.cluster import faults
from flyd.cluster.layout import Layout, layout
from flyd.cluster.providers import open_cluster
from flyd.cluster.registry import remember
from flyd.errors import Refused
from flyd.model import Resources

ADDRESSES = """\
1: lo    inet 127.0.0.1/8 scope host lo\\       valid_lft forever preferred_lft forever
7: eth1    inet 10.221.0.11/24 brd 10.221.0.255 scope global eth1\\       valid_lft forever
9: fly0    inet 10.221.0.1/32 scope global fly0\\       valid_lft forever preferred_lft forever
"""


@pytest.fixture
def processes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A cluster whose hosts are processes, as far as its files go."""
    monkeypatch.setenv("FLYD_HOME", str(tmp_path))
    plan = layout("some", ("ams", "iad", "sin"), 11, Resources(cpus=1))
    remember(plan)
    return plan


def test_the_device_is_found_by_the_address() -> None:
    assert faults.device_of(ADDRESSES, "10.221.0.11") == "eth1"
    with pytest.raises(Refused, match="cut off"):
        faults.device_of(ADDRESSES, "10.221.0.12")


@pytest.mark.parametrize(("kbit", "burst"), [(64, 32768), (1000, 32768), (1_000_000, 1_250_000)])
def test_a_burst_holds_what_passes_in_a_tick(kbit: int, burst: int) -> None:
    queues = [command for command in faults.slow_commands("eth1", kbit) if "tbf" in command]
    assert len(queues) == 2  # what leaves, and what arrives
    for queue in queues:
        assert queue[queue.index("burst") + 1] == f"{burst}b"
        assert queue[queue.index("rate") + 1] == f"{kbit}kbit"


@pytest.mark.parametrize(
    ("rest_mb", "to_the_end", "end"),
    [(20, False, "count=320"), (-3, False, "count=0"), (20, True, "; true")],
)
def test_the_last_part_of_the_filler(rest_mb: int, to_the_end: bool, end: str) -> None:
    assert faults.fill_script(rest_mb, to_the_end=to_the_end).endswith(end)


FAULTS: dict[str, Callable[..., object]] = {
    "fill-disk": partial(faults.fill_disk, leave_mb=0),
    "free-disk": faults.free_disk,
    "slow-link": partial(faults.slow_link, kbit=1000),
    "fast-link": faults.fast_link,
}


@pytest.mark.parametrize("verb", sorted(FAULTS))
def test_hosts_that_are_processes_have_no_such_fault(processes: Layout, verb: str) -> None:
    with pytest.raises(Refused, match="share this machine's") as raised:
        FAULTS[verb](open_cluster(processes), processes.hosts[0])
    assert "--provider docker" in raised.value.hint
    ran = CliRunner().invoke(fly, ["chaos", verb, "--name", "some", "ams"])
    assert isinstance(ran.exception, Refused)


@pytest.mark.parametrize(
    "words", [("fill-disk", "ams", "--leave-mb", "-1"), ("slow-link", "ams", "--kbit", "1")]
)
def test_numbers_that_make_no_sense(processes: Layout, words: tuple[str, ...]) -> None:
    ran = CliRunner().invoke(fly, ["chaos", words[0], "--name", "some", *words[1:]])
    assert ran.exit_code == 2
    assert "not in the range" in ran.output
