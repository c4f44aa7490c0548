from __future__ import annotations

import msgspec
import pytest

from flyd.machines.environment import Assignment, VolumeGrant, machine_spec, source_digest
from flyd.model import Guest, Host, Machine, MachineConfig, MachineSpec, Resources, Service

HOST = Host(
    name="h1",
    region="fra",
    api_address="127.0.0.1:1",
    address="127.10.0.1",
    subnet="127.10",
    capacity=Resources(),
    driver="process",
    version="0",
)
CLAIM = Machine(
    id="m1",
    app="web",
    name="web-1",
    region="fra",
    host="h1",
    instance_id="01A",
    config=MachineConfig(image="host:", guest=Guest(memory_mb=512), process_group="web"),
    private_ip="127.10.0.2",
    release=7,
)
VOLUME = VolumeGrant(id="v1", epoch=1, size_gb=1, path="/data")


def spec(
    cmd: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    *,
    secrets: dict[str, str] | None = None,
    volumes: tuple[VolumeGrant, ...] = (VOLUME,),
    host: Host = HOST,
    **config: object,
) -> MachineSpec:
    made = msgspec.structs.replace(CLAIM.config, cmd=cmd, env=env or {}, **config)
    assignment = Assignment(
        claim=msgspec.structs.replace(CLAIM, config=made),
        primary_region="ams",
        secrets=secrets or {},
        volumes=volumes,
        databases={"chat-db": 6001, "db": 6002},
    )
    return machine_spec(assignment, host, "/src", {"v1": "/host/data/v1", "v2": "/host/v2"})


def test_reserved_names() -> None:
    assert spec().env == {
        "FLY_APP_NAME": "web",
        "FLY_MACHINE_ID": "m1",
        "FLY_ALLOC_ID": "m1",
        "FLY_REGION": "fra",
        "FLY_IMAGE_REF": "host:",
        "FLY_MACHINE_VERSION": "01A",
        "FLY_PRIVATE_IP": "127.10.0.2",
        "FLY_PROCESS_GROUP": "web",
        "FLY_VM_MEMORY_MB": "512",
        "FLY_RELEASE_VERSION": "7",
        "PRIMARY_REGION": "ams",
    }


def test_secrets_win_over_env_and_reserved_names_over_both() -> None:
    env = spec(env={"A": "env", "B": "env", "FLY_REGION": "x"}, secrets={"B": "s", "PRIMARY_REGION": "x"}).env
    assert (env["A"], env["B"], env["FLY_REGION"], env["PRIMARY_REGION"]) == ("env", "s", "fra", "ams")


def test_port_is_the_first_services_unless_given() -> None:
    services = (Service(internal_port=8080), Service(internal_port=9090))
    assert spec(services=services).env["PORT"] == "8080"
    assert spec(env={"PORT": "3000"}, services=services).env["PORT"] == "3000"
    assert "PORT" not in spec().env


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/data", "/host/data/v1"),
        ("/data/app.db", "/host/data/v1/app.db"),
        ("--db=/data/app.db", "--db=/host/data/v1/app.db"),
        ("sqlite:////data/app.db", "sqlite:////host/data/v1/app.db"),
        ("/data:/data/x", "/host/data/v1:/host/data/v1/x"),
        ("/database", "/database"),
        ("/data-old/x", "/data-old/x"),
        ("/srv/data/x", "/srv/data/x"),
        ("./data/x", "./data/x"),
    ],
)
def test_mount_paths_become_the_hosts(word: str, expected: str) -> None:
    assert spec((word,)).command == (expected,)
    assert spec(env={"A": word}).env["A"] == expected


def test_a_container_has_its_mounts_where_they_are_named() -> None:
    docker = msgspec.structs.replace(HOST, driver="docker")
    made = spec(("/data/x", "db.internal:5432"), {"A": "/data"}, host=docker)
    assert (made.command, made.env["A"]) == (("/data/x", "127.10.0.1:6002"), "/data")
    assert made.mounts == (("/host/data/v1", "/data"),)


def test_nested_mounts_and_what_the_driver_is_told() -> None:
    made = spec(
        ("/data/x", "/data/cache/y"),
        volumes=(VOLUME, VolumeGrant(id="v2", epoch=1, size_gb=1, path="/data/cache/")),
    )
    assert made.command == ("/host/data/v1/x", "/host/v2/y")
    assert made.mounts == (("/host/data/v1", "/data"), ("/host/v2", "/data/cache/"))
    assert spec(("/data",), volumes=()).command == ("/data",)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("postgres://u:p@chat-db.internal:5432/chat", "postgres://u:p@127.10.0.1:6001/chat"),
        ("db.internal:5432", "127.10.0.1:6002"),
        ("db.internal:5433 db.internal:5432", "127.10.0.1:6003 127.10.0.1:6002"),
        ("other.internal:5432", "other.internal:5432"),
        ("db.internal:54321", "db.internal:54321"),
        ("my-db.internal:5432", "my-db.internal:5432"),
        ("web.internal:80", "web.internal:80"),
    ],
)
def test_databases_become_this_hosts_endpoint(value: str, expected: str) -> None:
    assert spec(secrets={"DATABASE_URL": value}).env["DATABASE_URL"] == expected
    assert spec((value,)).command == (expected,)


def test_references_in_command_words_are_the_machines_own_variables() -> None:
    made = spec(
        ("--bind=$FLY_PRIVATE_IP:${PORT}", "$HOME", "${FLY_REGION}x", "$PORTS", "100$"),
        env={"PORT": "80", "DIR": "$PORT"},
    )
    assert made.command == ("--bind=127.10.0.2:80", "$HOME", "frax", "$PORTS", "100$")
    assert made.env["DIR"] == "$PORT"


def test_the_rest_of_the_spec() -> None:
    made = spec(metadata={"run_as": "postgres"})
    assert (made.machine_id, made.app, made.instance_id) == ("m1", "web", "01A")
    assert made.image == "host:"
    assert (made.source_path, made.user, made.private_ip) == ("/src", "postgres", "127.10.0.2")
    assert made.guest.memory_mb == 512


def test_source_digest() -> None:
    assert source_digest("source:sha256:ab") == "ab"
    assert source_digest("host:") == ""
