"""The archive command, run by a real shell: one name, one content, for ever, whoever dies meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.errors import Refused
from pgha import archive, archive_owner
from pgha.archive_owner import ArchiveOwner
from pgha.wal import PLACEHOLDER

SEGMENT = 64  # bytes: small ones do
FORKED = f"{2:08X}{0:08X}{5:08X}"  # timeline 2 was left in it, 24 bytes in
FORK = 5 * SEGMENT + 24


class Archive:
    """One, and members that push into it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "an %archive's"
        self.wal = self.folder / "wal"
        self.wal.mkdir(parents=True)

    def member(self, name: str, token: str = "ours") -> Path:
        """Its script; `token`: of its cluster's etcd."""
        directory = self.root / name
        directory.mkdir(exist_ok=True)
        archive_owner.forget(directory)
        script = directory / "archive.sh"
        owned = archive_owner.owned_file(directory)
        script.write_text(archive.push_script(self.wal, name, owned, SEGMENT))
        archive_owner.claim(self.folder, ArchiveOwner(cluster="db", token=token), directory)
        return script

    def push(self, script: Path, name: str, content: bytes) -> subprocess.Popen[bytes]:
        """As Postgres would."""
        source = script.parent / "pg_wal"
        source.write_bytes(content)
        command = archive.push_command(script).replace("%f", name).replace("%p", "pg_wal").replace("%%", "%")
        return subprocess.Popen(
            ["sh", "-c", command], cwd=script.parent, stderr=subprocess.PIPE, start_new_session=True
        )

    def pushed(self, script: Path, name: str, content: bytes) -> str:
        """What it complained about; nothing if it succeeded."""
        process = self.push(script, name, content)
        said = process.communicate()[1].decode()
        assert (process.returncode == 0) == (said == "")
        return said

    def names(self) -> list[str]:
        return sorted(path.name for path in self.wal.iterdir())


@pytest.fixture
def one(tmp_path: Path) -> Archive:
    return Archive(tmp_path)


def test_an_archived_name_has_one_content_for_ever(one: Archive, tmp_path: Path) -> None:
    member, back = one.member("pg-1"), tmp_path / "back"
    assert one.pushed(member, "S", b"one") == ""
    assert one.pushed(member, "S", b"one") == ""
    for other in (b"two", b"longer", b"on"):
        assert "S is not archived: " in one.pushed(member, "S", other)
    assert one.names() == ["S"]
    fetch = archive.fetch_command(one.wal).replace("%p", str(back))
    fetches = {name: fetch.replace("%f", name).replace("%%", "%") for name in ("S", "T")}
    assert subprocess.run(["sh", "-c", fetches["S"]], check=False).returncode == 0
    assert back.read_bytes() == b"one"
    assert subprocess.run(["sh", "-c", fetches["T"]], check=False).returncode != 0


def test_members_that_archive_at_once_agree(one: Archive) -> None:
    content = os.urandom(3 << 20)
    members = [one.member(f"pg-{n}") for n in range(4)]
    pushes = [one.push(member, "S", content) for member in members]
    assert [push.communicate()[1] for push in pushes] == [b""] * 4
    assert one.names() == ["S"]
    assert (one.wal / "S").read_bytes() == content


def test_of_two_contents_at_once_one_stays_and_only_its_member_is_told_so(one: Archive) -> None:
    contents = [os.urandom(4 << 20) for _ in range(4)]
    members = [one.member(f"pg-{n}") for n in range(4)]
    for name in ("S", "T", "U"):
        pushes = [one.push(*pair) for pair in zip(members, (name,) * 4, contents, strict=True)]
        said = [push.communicate()[1] for push in pushes]
        stored = (one.wal / name).read_bytes()
        assert [content == stored for content in contents] == [not text for text in said]
        assert stored in contents


def test_a_push_that_was_killed_shows_nothing_or_all_of_it(one: Archive) -> None:
    content = os.urandom(16 << 20)
    member = one.member("pg-1")
    for n in range(8):
        name = f"S{n:02d}"
        before = len(one.names())
        process = one.push(member, name, content)
        while len(one.names()) == before and process.poll() is None:
            pass  # it has not begun to copy
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.002 * n)  # killed later each time
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if (one.wal / name).exists():
            assert (one.wal / name).read_bytes() == content
        assert one.pushed(member, name, content) == ""
        assert (one.wal / name).read_bytes() == content


def test_the_segment_of_a_fork_is_compared_up_to_the_fork(one: Archive) -> None:
    member = one.member("pg-1")
    right = os.urandom(24)
    assert one.pushed(member, FORKED, right + b"a" * 40) == ""
    same = right + b"b" * 40
    assert "another content" in one.pushed(member, FORKED, same)  # for all we know timeline 2 goes on
    history = f"1\t0/00000040\tnone\n\n2\t0/{FORK:08X}\tnone\n"
    assert one.pushed(member, "00000003.history", history.encode()) == ""
    assert one.pushed(member, FORKED, same) == ""
    assert one.pushed(member, FORKED + ".partial", same) == ""
    assert one.pushed(member, FORKED + ".partial", right + b"c" * 40) == ""
    assert "another content" in one.pushed(member, FORKED, b"x" + same[1:])
    before = f"{2:08X}{0:08X}{4:08X}"
    assert one.pushed(member, before, b"1" * SEGMENT) == ""
    assert "another content" in one.pushed(member, before, b"2" * SEGMENT)
    assert (one.wal / FORKED).read_bytes() == right + b"a" * 40


def test_a_placeholder_takes_no_name(one: Archive) -> None:
    member = one.member("pg-1")
    assert one.pushed(member, "00000003.history", PLACEHOLDER.encode()) == ""
    assert one.names() == []
    assert one.pushed(member, "00000003.history", b"2\t0/5000018\treal\n") == ""
    assert one.pushed(member, "00000003.history", PLACEHOLDER.encode()) == ""


def test_a_clone_with_the_same_configuration_archives_nothing(one: Archive) -> None:
    """Incident 23: same system id, same timelines, same folder; only its etcd is another."""
    assert one.pushed(one.member("pg-1"), "S", b"one") == ""
    with pytest.raises(Refused, match=r"belongs to another cluster \(db\)") as refused:
        one.member("clone", token="the clone's")
    assert "archive of its own" in refused.value.hint
    clone = one.root / "clone" / "archive.sh"
    for name, content in (("S", b"one"), ("S", b"two"), ("T", b"three")):
        assert "give this cluster an archive of its own" in one.pushed(clone, name, content)
    assert one.names() == ["S"]
    owned = archive_owner.owned_file(one.root / "clone")
    shutil.copy(archive_owner.owned_file(one.root / "pg-1"), owned)  # the whole volume was copied
    archive_owner.forget(owned.parent)  # ... and its agent began
    assert "archive of its own" in one.pushed(clone, "T", b"three")


@pytest.fixture(scope="module")
def many() -> Iterator[Archive]:
    root = Path(tempfile.mkdtemp(prefix="pgha-a-"))
    yield Archive(root)
    shutil.rmtree(root)


@settings(max_examples=25, deadline=None)
@given(
    pushes=st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from("ST"), st.binary(max_size=3)), max_size=6
    )
)
def test_whatever_is_pushed_the_first_content_stays(
    many: Archive, pushes: list[tuple[str, str, bytes]]
) -> None:
    shutil.rmtree(many.wal)
    many.wal.mkdir()
    first: dict[str, bytes] = {}
    for member, name, content in pushes:
        said = many.pushed(many.member(member), name, content)
        assert (said == "") == (first.setdefault(name, content) == content)
    assert {path.name: path.read_bytes() for path in many.wal.iterdir()} == first
