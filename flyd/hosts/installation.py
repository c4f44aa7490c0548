"""The running flyd as folders: what must be seen, at the same paths, where its programs are to run."""

from __future__ import annotations

import sys
from pathlib import Path

import flyd


def installation_folders() -> tuple[str, ...]:
    """This Python's environment, the Python it was made from, and flyd's source where it is apart."""
    folders = [Path(sys.prefix), Path(flyd.__file__).parent.parent]
    if sys.base_prefix not in ("/usr", "/usr/local"):  # there, an image has a Python of its own
        folders.append(Path(sys.base_prefix))
    inside = [f for f in folders if not any(other in f.parents for other in folders)]
    return tuple(str(folder) for folder in dict.fromkeys(inside))
