"""Whether a Postgres answers at an address, asked without logging in: ports.Lookout.

The question is a request for TLS (SSLRequest), which a server answers with one byte before it looks at
anything else, also while it starts or refuses sessions; leaving after that puts nothing into its log.

Made by pgha/main.py. Decides nothing: what an answer means is in pgha/decide.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct

from pgha.model import Answer

SSL_REQUEST = struct.pack("!II", 8, 80877103)


class TcpLookout:
    """ports.Lookout over TCP."""

    async def ask(self, address: str, timeout_s: float) -> Answer:
        """Connect, ask, wait for one byte. A connection that is closed without it counts as silent."""
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
                try:
                    writer.write(SSL_REQUEST)
                    return Answer.ANSWERED if await reader.read(1) else Answer.SILENT
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
        except (ConnectionRefusedError, ConnectionResetError):
            return Answer.REFUSED
        except (OSError, TimeoutError):
            return Answer.SILENT
