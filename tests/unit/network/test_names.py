from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.model import App, AppKind, Desired, Host, Machine, MachineConfig, MachineState, PostgresLeader
from flyd.network.names import (
    MAX_TEXT_BYTES,
    Answer,
    NamesView,
    Outcome,
    Question,
    RecordType,
    answer,
    names_view,
)
from tests.support import edge as values

APPS = (
    App(name="chat"),
    App(name="idle"),
    App(name="chat-db", kind=AppKind.POSTGRES, endpoint_port=5432),
    App(name="secret", network="apart"),
)
HERE = values.host("ams", address="10.11.0.1")
HOSTS = (HERE, values.host("iad"), values.host("sin"))


def machine(
    machine_id: str, region: str, ip: str, *, app: str = "chat", group: str = "app", **metadata: str
) -> Machine:
    made = values.machine(machine_id, region, app=app, ip=ip)
    config = MachineConfig(image="host:", process_group=group, metadata=metadata)
    return msgspec.structs.replace(made, config=config)


MACHINES = (
    machine("a1", "sin", "10.13.0.2"),
    machine("a2", "ams", "10.11.0.2", color="Blue"),
    machine("a3", "iad", "10.12.0.2", group="worker", color="blue"),
    machine("a4", "iad", "10.12.0.3"),  # stopped
    machine("p1", "ams", "10.11.0.3", app="chat-db"),
    machine("p2", "iad", "10.12.0.4", app="chat-db"),
    machine("s1", "iad", "10.12.0.5", app="secret"),
)
LEADER = PostgresLeader(cluster="chat-db", epoch=3, node="chat-db-2", address="10.12.0.4:5432", serving=True)


def view(
    *,
    alive: tuple[str, ...] = ("ams-1", "iad-1", "sin-1"),
    leader: PostgresLeader = LEADER,
    expelled: tuple[str, ...] = (),
    hosts: tuple[Host, ...] = HOSTS,
) -> NamesView:
    return names_view(
        hosts[0],
        hosts=hosts,
        alive=alive,
        apps=APPS,
        machines=MACHINES,
        statuses=[
            values.status(m, state=MachineState.STOPPED if m.id == "a4" else MachineState.STARTED)
            for m in MACHINES
        ],
        leaders=[leader],
        expelled=expelled,
    )


def ask(
    name: str, kind: RecordType = RecordType.A, *, source: str = "", of: NamesView | None = None
) -> Answer:
    return answer(Question(name=name, type=kind, source=source), of or view())


@pytest.mark.parametrize(
    ("name", "addresses"),
    [
        ("chat.internal", ("10.11.0.2", "10.12.0.2", "10.13.0.2")),  # nearest first, a4 is stopped
        ("CHAT.Internal.", ("10.11.0.2", "10.12.0.2", "10.13.0.2")),
        ("global.chat.internal", ("10.11.0.2", "10.12.0.2", "10.13.0.2")),
        ("iad.chat.internal", ("10.12.0.2",)),
        ("lhr.chat.internal", ()),  # a region, though nothing is there
        ("a3.vm.chat.internal", ("10.12.0.2",)),
        ("a4.vm.chat.internal", ()),
        ("worker.process.chat.internal", ("10.12.0.2",)),
        ("top1.nearest.of.chat.internal", ("10.11.0.2",)),
        ("top2.nearest.of.chat.internal", ("10.11.0.2", "10.12.0.2")),
        ("top99.nearest.of.chat.internal", ("10.11.0.2", "10.12.0.2", "10.13.0.2")),
        ("blue.color.kv._metadata.chat.internal", ("10.11.0.2", "10.12.0.2")),
        ("red.color.kv._metadata.chat.internal", ()),
        ("idle.internal", ()),
        ("chat.flycast", ("10.11.0.1",)),
        ("chat-db.internal", ("10.11.0.1",)),  # the endpoint here; its port follows the primary
        ("top2.nearest.of.chat-db.internal", ("10.11.0.3", "10.12.0.4")),
        ("primary.role.kv._metadata.chat-db.internal", ("10.12.0.4",)),
        ("replica.role.kv._metadata.chat-db.internal", ("10.11.0.3",)),
        ("regions.chat.internal", ()),  # has texts only
    ],
)
def test_addresses(name: str, addresses: tuple[str, ...]) -> None:
    assert ask(name) == Answer(outcome=Outcome.FOUND, records=addresses)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("regions.chat.internal", "ams,iad,sin"),
        ("vms.chat.internal", "a2 ams,a3 iad,a1 sin"),
        ("all.vms.chat.internal", "a2 ams,a3 iad,a4 iad,a1 sin"),
        ("_apps.internal", "chat,chat-db,idle,secret"),
        ("regions.idle.internal", ""),
    ],
)
def test_texts(name: str, text: str) -> None:
    assert ask(name, RecordType.TXT) == Answer(outcome=Outcome.FOUND, records=(text,))


def test_instances_are_listed_with_address_and_region() -> None:
    assert (
        "instance=a3,app=chat,ip=10.12.0.2,region=iad"
        in ask("_instances.internal", RecordType.TXT).records[0]
    )
    assert "instance=a4" not in ask("_instances.internal", RecordType.TXT).records[0]
    assert "instance=a4" in ask("all._instances.internal", RecordType.TXT).records[0]


@pytest.mark.parametrize(
    "name",
    [
        "nobody.internal",
        "internal",
        "flycast",
        "nobody.flycast",
        "x.chat.flycast",
        "moon.chat.internal",
        "top0.nearest.of.chat.internal",
        "top.nearest.of.chat.internal",
        "a.b.c.chat.internal",
        "_nothing.internal",
    ],
)
def test_names_that_are_not_there(name: str) -> None:
    assert ask(name).outcome is Outcome.NO_SUCH_NAME


@pytest.mark.parametrize("name", ["example.com", "", "chat", "internal.example.com"])
def test_others_names_are_not_ours(name: str) -> None:
    assert ask(name).outcome is Outcome.NOT_OURS


@pytest.mark.parametrize(
    ("name", "addresses"),
    [
        ("chat.internal", ("fdaa:0:0:a0b::2", "fdaa:0:0:a0c::2")),  # sin's machines are processes
        ("iad.chat.internal", ("fdaa:0:0:a0c::2",)),
        ("a1.vm.chat.internal", ()),
        ("top1.nearest.of.chat.internal", ("fdaa:0:0:a0b::2",)),
        ("primary.role.kv._metadata.chat-db.internal", ("fdaa:0:0:a0c::4",)),
        ("chat-db.internal", ()),  # the endpoint, which listens on IPv4
        ("chat.flycast", ()),
    ],
)
def test_aaaa_names_the_machines_that_have_ipv6(name: str, addresses: tuple[str, ...]) -> None:
    containers = [msgspec.structs.replace(h, driver="docker", wg_public_key="key") for h in HOSTS[:2]]
    of = view(hosts=(*containers, HOSTS[2]))
    assert ask(name, RecordType.AAAA, of=of) == Answer(outcome=Outcome.FOUND, records=addresses)
    assert ask(name, of=of) == ask(name)


def test_without_a_tunnel_there_is_no_ipv6() -> None:
    of = view(hosts=tuple(msgspec.structs.replace(h, driver="docker") for h in HOSTS))
    assert ask("chat.internal", RecordType.AAAA, of=of) == Answer(outcome=Outcome.FOUND)


@pytest.mark.parametrize("kind", [RecordType.AAAA, RecordType.OTHER])
def test_other_types_are_empty_not_absent(kind: RecordType) -> None:
    assert ask("chat.internal", kind) == Answer(outcome=Outcome.FOUND)


def test_machines_of_silent_hosts_are_named_only_where_nothing_else_is() -> None:
    lost = view(alive=("ams-1", "sin-1"))
    assert ask("chat.internal", of=lost).records == ("10.11.0.2", "10.13.0.2")
    assert ask("iad.chat.internal", of=lost).records == ("10.12.0.2",)
    assert ask("a3.vm.chat.internal", of=lost).records == ("10.12.0.2",)


def test_machines_of_expelled_hosts_are_not_named() -> None:
    """Though they may be all there is, and one of them the primary by its own word."""
    of = view(expelled=("iad-1",))
    assert ask("chat.internal", of=of).records == ("10.11.0.2", "10.13.0.2")
    assert ask("iad.chat.internal", of=of).records == ()
    assert ask("a3.vm.chat.internal", of=of).records == ()
    assert ask("primary.role.kv._metadata.chat-db.internal", of=of).records == ()
    assert ask("all.vms.chat.internal", RecordType.TXT, of=of).records == ("a2 ams,a1 sin",)


def test_no_primary_while_none_serves() -> None:
    opening = view(leader=PostgresLeader(cluster="chat-db", epoch=4, node="n", address="10.12.0.4:5432"))
    assert ask("primary.role.kv._metadata.chat-db.internal", of=opening) == Answer(outcome=Outcome.FOUND)


def test_a_network_sees_its_own_apps_only() -> None:
    assert ask("chat.internal", source="10.12.0.5").outcome is Outcome.NO_SUCH_NAME
    assert ask("chat.flycast", source="10.12.0.5").outcome is Outcome.NO_SUCH_NAME
    assert ask("secret.internal", source="10.12.0.5").records == ("10.12.0.5",)
    assert ask("secret.internal", source="10.11.0.2").outcome is Outcome.NO_SUCH_NAME
    assert ask("_apps.internal", RecordType.TXT, source="10.12.0.5").records == ("secret",)
    assert "app=chat" not in ask("_instances.internal", RecordType.TXT, source="10.12.0.5").records[0]
    assert ask("secret.internal", source="10.11.0.1").records == ("10.12.0.5",)  # the host


def test_a_former_host_does_not_keep_a_name() -> None:
    moved = MACHINES[0]
    stale = values.status(moved, host="elsewhere")
    stopping = values.machine("z", "ams", desired=Desired.STOPPED)
    of = names_view(
        HERE,
        hosts=HOSTS,
        alive=(),
        apps=APPS,
        machines=[moved, stopping],
        statuses=[stale, values.status(stopping)],
        leaders=[],
    )
    assert ask("chat.internal", of=of) == Answer(outcome=Outcome.FOUND)


def test_texts_end_where_a_message_does() -> None:
    many = [values.machine(f"m{n:05d}", "ams", ip=f"10.11.{n // 250}.{n % 250 + 2}") for n in range(3000)]
    of = names_view(
        HERE,
        hosts=HOSTS,
        alive=(),
        apps=APPS,
        machines=many,
        statuses=[values.status(m) for m in many],
        leaders=[],
    )
    text = ask("_instances.internal", RecordType.TXT, of=of).records[0]
    assert MAX_TEXT_BYTES - 100 < len(text) <= MAX_TEXT_BYTES
    assert text.endswith("region=ams")


LABEL = st.sampled_from(
    [
        "chat",
        "chat-db",
        "top1",
        "nearest",
        "of",
        "iad",
        "vm",
        "a1",
        "kv",
        "_metadata",
        "role",
        "all",
        "vms",
        "",
    ]
)


@settings(max_examples=100)
@given(st.lists(LABEL, max_size=6), st.sampled_from(["internal", "flycast", "com"]))
def test_any_name_has_an_answer_and_only_started_machines(labels: list[str], zone: str) -> None:
    found = ask(".".join([*labels, zone]))
    assert (found.outcome is Outcome.NOT_OURS) == (zone == "com")
    assert "10.12.0.3" not in found.records
