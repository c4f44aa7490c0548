"""What a flyd does not load until it needs it: each of these costs it ten megabytes and more."""

from __future__ import annotations

import subprocess
import sys

import pytest

ON_DEMAND = ("cryptography", "psycopg", "docker", "dns")


@pytest.mark.parametrize("module", ["flyd.daemon", "flyd.cli.main"])
def test_what_is_not_loaded_at_the_start(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ON_DEMAND).isdisjoint(ran.stdout.split())
