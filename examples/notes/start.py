"""Makes the database on the volume at the first start, notes each start in it, and becomes datasette."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing

SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS notes (
    id integer PRIMARY KEY,
    title text NOT NULL,
    body text NOT NULL,
    written_at text NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ'))
);
CREATE TABLE IF NOT EXISTS starts (
    id integer PRIMARY KEY,
    region text NOT NULL,
    machine text NOT NULL,
    started_at text NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ'))
);
INSERT OR IGNORE INTO notes (id, title, body) VALUES
    (1, 'What this is', 'A SQLite file on a volume, served by datasette.'),
    (2, 'What stays', 'The table starts has one row for each start: the volume outlives the machine.');
COMMIT;
"""


def main() -> None:
    path = os.environ.get("NOTES_DB", "notes.db")
    with closing(sqlite3.connect(path)) as database:
        database.executescript(SCHEMA)
        where = (os.environ.get("FLY_REGION", "local"), os.environ.get("FLY_MACHINE_ID", "local"))
        with database:
            database.execute("INSERT INTO starts (region, machine) VALUES (?, ?)", where)
    host, port = os.environ.get("FLY_PRIVATE_IP", "127.0.0.1"), os.environ.get("PORT", "8001")
    os.execvp("datasette", ["datasette", "serve", path, "--host", host, "--port", port])


if __name__ == "__main__":
    main()
