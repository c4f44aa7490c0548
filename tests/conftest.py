"""For all tests of this folder."""

from __future__ import annotations

import importlib
import signal

importlib.import_module("flyd")  # before anybody imports gRPC: see there


def pytest_sessionstart() -> None:
    """Let commands be interrupted and hung up on: a shell that starts the tests in the background has
    Ctrl-C ignored, nohup a hang-up, and every process that we start would inherit that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
