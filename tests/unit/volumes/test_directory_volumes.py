"""The fence as a rule: any sequence of calls. Crashes: test_volume_crashes.py."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

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
