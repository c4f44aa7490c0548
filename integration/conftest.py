"""One cluster for all tests that use one; they run last, when no other test is timing anything."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from integration.cluster import Cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the whole cluster behind those that start parts of their own."""
    items.sort(key=lambda item: "cluster" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def cluster() -> Generator[Cluster]:
    """Three regions with chat and notes; at the end nothing of it may be left."""
    made = Cluster()
    try:
        made.deploy_examples()
        yield made
    finally:
        made.destroy()
