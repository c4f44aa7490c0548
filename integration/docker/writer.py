"""A program: writes rows without pause, and says of each which server acknowledged it and when.

It runs inside a host (`hosts.py` starts it there), so that a host that is cut off has a client, too.
Usage: writer.py NAME URI. One JSON line on standard output for each acknowledgement; ends when
its standard input does. All hosts are containers of one machine, so all writers read one clock.
A row without an answer is written again under its key until it is acknowledged.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import psycopg

PAUSE_S = 0.01
RETRY_S = 0.05
SAVE = """
INSERT INTO messages (key, author, text, region) VALUES (%s, %s, 'from a writer', 'none')
ON CONFLICT (key) DO UPDATE SET key = excluded.key
RETURNING host(inet_server_addr())
"""


def connect(uri: str) -> psycopg.Connection:
    """A connection that does not wait long for a server that is not there any more."""
    return psycopg.connect(
        uri,
        autocommit=True,
        connect_timeout=2,
        tcp_user_timeout=1500,
        keepalives_idle=1,
        keepalives_interval=1,
    )


def keep_writing(name: str, uri: str, stop: threading.Event) -> None:
    """One row after the other."""
    number = 1
    while not stop.is_set():
        try:
            with connect(uri) as connection:
                while not stop.is_set():
                    key = f"{name}-{number}"
                    row = connection.execute(SAVE, (key, name)).fetchone()
                    assert row is not None
                    print(json.dumps({"key": key, "server": row[0], "at_s": time.time()}), flush=True)
                    number += 1
                    time.sleep(PAUSE_S)
        except psycopg.Error as error:
            text = " ".join(str(error).split())
            print(json.dumps({"failed": text, "at_s": time.time()}), flush=True)
            time.sleep(RETRY_S)


def main() -> None:
    """Write in a thread that dies with us, until standard input ends."""
    name, uri = sys.argv[1:]
    stop = threading.Event()
    threading.Thread(target=keep_writing, args=(name, uri, stop), daemon=True).start()
    sys.stdin.read()
    stop.set()


if __name__ == "__main__":
    main()
