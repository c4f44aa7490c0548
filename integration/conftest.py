"""One cluster for all tests that use one; they run last, when no other test is timing anything."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Generator

import pytest

importlib.import_module("flyd")  # before anybody imports gRPC: see there

from integration.cluster import Cluster  # noqa: E402


def pytest_sessionstart() -> None:
    """Let commands be interrupted and hung up on: a shell that starts the tests in the background has
    Ctrl-C ignored, nohup a hang-up, and every process that we start would inherit that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that share a cluster behind those that start parts of their own."""
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
