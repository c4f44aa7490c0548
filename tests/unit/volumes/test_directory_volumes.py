"""The fence as a rule (any sequence of calls), and a crash before each change of the disk."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.errors import Refused
from volumes.directory import DirectoryVolumes

Call = tuple[str, str, int]
CALLS = st.lists(
    st.tuples(st.sampled_from(["attach", "detach"]), st.sampled_from(["m1", "m2", "m3"]), st.integers(1, 4)),
    max_size=12,
)


async def _epochs_only_grow(calls: list[Call]) -> None:
    with tempfile.TemporaryDirectory() as top:
        store = DirectoryVolumes(Path(top))
        await store.create("vol1", 1)
        newest, owner = 0, ""
        for verb, machine_id, epoch in calls:
            if verb == "detach":
                await store.detach("vol1", machine_id, epoch)
                continue
            allowed = epoch > newest or (epoch == newest and owner == machine_id)
            try:
                await store.attach("vol1", machine_id, epoch)
            except Refused:
                assert not allowed
            else:
                assert allowed
                newest, owner = epoch, machine_id


@settings(max_examples=60, deadline=None)
@given(CALLS)
def test_a_claim_is_taken_only_if_it_is_the_latest(calls: list[Call]) -> None:
    asyncio.run(_epochs_only_grow(calls))


class Crash(BaseException):
    """The power is cut: nothing after this happens."""


def test_every_operation_goes_on_from_every_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, crash_at = 0, 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == crash_at:
                raise Crash
            return function(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "mkdir", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))

    async def life(store: DirectoryVolumes) -> None:
        await store.create("vol1", 1)
        path = await store.attach("vol1", "m1", 1)
        assert Path(path).is_dir()
        await store.detach("vol1", "m1", 1)
        await store.destroy("vol1")
        assert not Path(path).exists()

    asyncio.run(life(DirectoryVolumes(tmp_path / "whole")))
    total = calls
    assert total > 10
    for point in range(1, total + 1):
        calls, crash_at = 0, point
        with pytest.raises(Crash):
            asyncio.run(life(DirectoryVolumes(tmp_path / str(point))))
        crash_at = 0
        asyncio.run(life(DirectoryVolumes(tmp_path / str(point))))
        assert os.listdir(tmp_path / str(point)) == []
