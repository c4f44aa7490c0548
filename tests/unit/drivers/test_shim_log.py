"""The shim's log when the disk is full: the machine never waits, and the loss is said."""

from __future__ import annotations

import os
from pathlib import Path

from flyd.drivers.process.log import parse, read_lines
from flyd.drivers.process.shim import Log


async def test_lines_lost_to_a_full_disk_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "output.log"
    log = Log(str(path), 1_000_000)
    log.write(b"before\n")
    real, log.fd = log.fd, os.open("/dev/full", os.O_WRONLY)
    log.write(b"one\ntwo\n")
    log.write(b"three\nhal")
    os.close(log.fd)
    log.fd = real
    log.write(b"f\n")
    log.close()
    texts = [line.text async for line in read_lines("m1", path, 100, False)]
    assert texts == ["before", "flyd: 3 lines of output were lost: no space", "half"]


def test_what_is_no_line_is_passed_over() -> None:
    assert parse("m1", b"") is None
    assert parse("m1", b"cut short") is None
    line = parse("m1", b"12.500000 two words ")
    assert line is not None
    assert (line.at_s, line.text) == (12.5, "two words ")
