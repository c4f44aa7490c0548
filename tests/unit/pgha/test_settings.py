"""What a member is told by file and environment, and what is said about a mistake in either."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flyd.errors import InvalidInput
from pgha.settings import SETTINGS, read

ROOT = Path(__file__).parents[3]
FILE = """\
# one member
cluster = "orders"
node = "orders-1"
members = ["orders-1", "orders-2"]
address = "10.0.0.11"
port = 5433
"""


def written(folder: Path, text: str, mode: int = 0o644) -> str:
    path = folder / "pgha.toml"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_file_says_it_all(tmp_path: Path) -> None:
    settings = read(written(tmp_path, FILE), {})
    assert settings.text("cluster") == "orders"
    assert settings.texts("members") == ("orders-1", "orders-2")
    assert settings.text("port") == "5433"
    assert settings.text("archive_dir") == ""


def test_the_environment_wins_and_alone_suffices(tmp_path: Path) -> None:
    env = {"PGHA_NODE": "orders-2", "PGHA_VOTERS": "orders-2, orders-3", "FLY_PRIVATE_IP": "10.0.0.12"}
    both = read(written(tmp_path, FILE), env)
    assert (both.text("node"), both.text("address"), both.text("port")) == ("orders-2", "10.0.0.12", "5433")
    assert both.place("node") == "PGHA_NODE"
    assert both.place("cluster").endswith("pgha.toml, line 2: cluster")
    alone = read("", env)
    assert alone.texts("members") == ("orders-2", "orders-3")
    assert alone.text("port") == "5432"


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        (FILE + 'adress = "x"\n', "line 7: adress is no key of pgha", "Did you mean address?"),
        (FILE + "zzz = 1\n", "line 7: zzz is no key of pgha", "docs/pgha.md"),
        (FILE.replace("5433", '"5433"'), "line 6: port must be a port number, not '5433'", ""),
        (FILE.replace("5433", "70000"), "line 6: port=70000 is not a port number", ""),
        (FILE.replace("5433", "true"), "line 6: port must be a port number, not True", ""),
        (
            FILE.replace('["orders-1", "orders-2"]', '"orders-1"'),
            "line 4: members must be a list of texts",
            "",
        ),
        (FILE.replace('["orders-1", "orders-2"]', "[1]"), "line 4: members must be a list of texts", ""),
        (FILE.replace('"10.0.0.11"', "10"), "line 5: address must be a text, not 10", ""),
        ("node = orders-1\n", "is not TOML: Invalid value (at line 1", "quotes"),
        ('[postgres]\nport = "x"\n', "line 1: postgres is no key of pgha", ""),
        ('superuser_password = "x"\n', "others than its owner can read it", "chmod 600"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, says: str, hint: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        read(written(tmp_path, text), {})
    assert says in raised.value.message
    assert hint in raised.value.hint


def test_a_password_may_be_in_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    settings = read(written(tmp_path, 'superuser_password = "x"\n', 0o600), {})
    assert settings.text("superuser_password") == "x"


def test_what_is_not_said_at_all_is_named_with_both_its_names(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="etcd is not set, nor is FLYD_ETCD"):
        read(written(tmp_path, FILE), {}).texts("etcd")
    with pytest.raises(InvalidInput, match=r"absent\.toml can not be read"):
        read(str(tmp_path / "absent.toml"), {})
    with pytest.raises(InvalidInput, match="PGHA_PORT=x is not a port number"):
        read("", {"PGHA_PORT": "x"})


def test_the_document_has_every_setting_and_no_other() -> None:
    text = (ROOT / "docs" / "pgha.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (`[A-Z_`, ]+) \|", text, re.MULTILINE))
    assert {key: re.findall(r"\w+", names) for key, names in rows.items()} == {
        setting.key: list(setting.variables) for setting in SETTINGS
    }
