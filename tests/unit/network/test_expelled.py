"""Who is cut off, and from what; integration/test_mesh.py has it in force."""

from __future__ import annotations

import pytest

from flyd.model import Host, Membership
from flyd.network.expelled import cut_off, expelled_hosts
from tests.support.network import host

SUBNETS = ("10.12.0.0/16", "fdaa:0:0:a0c::/64")  # of the expelled host b


def membership(name: str, number: int, *addresses: str, expelled_at_s: float = 5.0) -> Membership:
    return Membership(
        host=name,
        id=f"id-{name}",
        public_key="",
        addresses=addresses,
        subnet=f"10.{number}",
        joined_at_s=1.0,
        expelled_at_s=expelled_at_s,
    )


def test_the_expelled_are_those_with_a_time_but_never_oneself() -> None:
    memberships = [
        membership("c", 13),
        membership("b", 12),
        membership("a", 11),
        membership("d", 14, expelled_at_s=0.0),
    ]
    assert expelled_hosts("a", memberships) == ("b", "c")
    assert expelled_hosts("a", []) == ()


@pytest.mark.parametrize(
    ("addresses", "cut"),
    [
        (("192.0.2.12", "10.12.0.1"), ("192.0.2.12/32",)),  # the second is in its subnet
        (("2001:db8::12",), ("2001:db8::12/128",)),
        (("127.12.0.1", "::1", "somewhere.example"), ()),  # no address, or everybody's
    ],
)
def test_an_expelled_hosts_addresses_are_cut_off(addresses: tuple[str, ...], cut: tuple[str, ...]) -> None:
    found = cut_off((host("a", 11),), [membership("b", 12, *addresses)], ("b",))
    assert found == tuple(sorted((*SUBNETS, *cut)))


@pytest.mark.parametrize(
    ("member", "cut"),
    [
        (host("d", 14, beneath="192.0.2.12"), SUBNETS),  # set up again on the same machine
        (host("d", 12, beneath="192.0.2.14"), ("192.0.2.12/32",)),  # given the same subnet
        (host("d", 14, "10.12.0.1", beneath="192.0.2.14"), ("192.0.2.12/32", SUBNETS[1])),
    ],
)
def test_what_a_member_has_is_not_cut_off(member: Host, cut: tuple[str, ...]) -> None:
    assert cut_off((host("a", 11), member), [membership("b", 12, "192.0.2.12")], ("b",)) == cut


def test_what_a_member_will_have_is_not_cut_off() -> None:
    """It has joined, and has not yet said what it is."""
    joined = membership("d", 14, "192.0.2.12", expelled_at_s=0.0)
    assert cut_off((), [membership("b", 12, "192.0.2.12"), joined], ("b",)) == SUBNETS
