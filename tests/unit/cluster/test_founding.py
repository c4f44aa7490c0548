"""What `fly hosts found` makes of words, and what is in an archive."""

from __future__ import annotations

import io
import tarfile
import tomllib

import pytest

from flyd.cluster.founding import founding_layout, host_archive
from flyd.errors import InvalidInput

THREE = ("ams-1=ams@192.0.2.1", "iad-1=iad@192.0.2.2", "sin-1=sin@192.0.2.3")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("ams-1",),
        ("ams-1=ams",),
        ("ams-1=ams@nowhere",),
        ("ams-1=ams@192.0.2.300",),
        ("=ams@192.0.2.1",),
        ("a/b=ams@192.0.2.1",),
        THREE[:2],  # two voters survive no loss
        (THREE[0], THREE[0], THREE[2]),
        (THREE[0], "ams-2=fra@192.0.2.1", THREE[2]),
    ],
)
def test_words_that_found_nothing(words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput):
        founding_layout("prod", words, "docker")


def test_an_archive_says_everything_a_host_needs() -> None:
    plan = founding_layout("prod", THREE, "docker")
    packed = host_archive(plan, plan.hosts[1], {"key.pem": b"secret"})
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        modes = {entry.name: entry.mode for entry in archive}
        texts = {e.name: f.read().decode() for e in archive if (f := archive.extractfile(e)) is not None}
    assert modes["var/lib/flyd/identity"] == 0o700
    assert modes["var/lib/flyd/identity/key.pem"] == 0o600
    config = tomllib.loads(texts["etc/flyd.toml"])
    assert (config["name"], config["region"], config["public_address"]) == ("iad-1", "iad", "192.0.2.2")
    assert (config["subnet"], config["address"], config["mesh"]) == ("10.212", "10.212.0.1", "wireguard")
    assert config["etcd"] == ["192.0.2.1:2379", "192.0.2.2:2379", "192.0.2.3:2379"]
    assert "KillMode=process" in texts["etc/systemd/system/flyd.service"]
    etcd = texts["etc/systemd/system/etcd.service"]
    assert "--client-cert-auth" in etcd
    assert "ams-1=https://192.0.2.1:2380,iad-1=https://192.0.2.2:2380" in etcd
