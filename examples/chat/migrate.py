"""The release command: makes the table if it is missing. Waits for a database that is still starting."""

from __future__ import annotations

import os
import sys
import time

import psycopg

DEADLINE_S = 60.0
PAUSE_S = 0.5
CONNECT_TIMEOUT_S = 5

SCHEMA = """
CREATE TABLE IF NOT EXISTS messages (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key text NOT NULL UNIQUE,
    author text NOT NULL,
    text text NOT NULL,
    region text NOT NULL,
    sent_at timestamptz NOT NULL DEFAULT now()
)
"""


def main() -> int:
    url = os.environ.get("DATABASE_URL", "")
    if not url:
        print("DATABASE_URL is not set: attach a database (fly postgres attach)", file=sys.stderr)
        return 1
    give_up_at = time.monotonic() + DEADLINE_S
    while True:
        try:
            with psycopg.connect(url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S) as connection:
                connection.execute(SCHEMA)
        except (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction) as error:
            reason = str(error).strip()
            if time.monotonic() >= give_up_at:
                print(f"no usable database within {DEADLINE_S:g} s: {reason}", file=sys.stderr)
                return 1
            print(f"waiting for the database: {reason}", flush=True)
            time.sleep(PAUSE_S)
        else:
            print("the table messages is there")
            return 0


if __name__ == "__main__":
    sys.exit(main())
