"""What a process shows of itself and whom it trusts, for gRPC: an identity folder on disk (folder.py).

Certificates are renewed while processes run. A server reads the folder at each handshake. A
client's open connections go on with what they showed; `Credentials.version` changes with the
certificate, and whoever has a channel that is not connected makes it anew (`SecureChannel`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import msgspec

from flyd.errors import NotFound
from flyd.identity.folder import CERTIFICATE, CLIENTS_CA, DESCRIPTION, HOSTS_CA, KEY, Description
from flyd.identity.subjects import ANY_HOST, host_dns_name
from flyd.model import decode

Options = tuple[tuple[str, Any], ...]


def open_channel(address: str, credentials: grpc.ChannelCredentials, options: Options = ()) -> grpc.Channel:
    """A channel for a command, which takes whichever host of the cluster answers at the address."""
    name = ("grpc.ssl_target_name_override", host_dns_name(ANY_HOST))
    return grpc.secure_channel(address, credentials, options=(*options, name))


class Credentials:
    """One identity folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / CERTIFICATE).exists():
            raise NotFound(
                f"there is no certificate in {folder}",
                hint="A host gets one by `fly hosts join`, a person by `fly cluster user`.",
            )

    @property
    def version(self) -> int:
        """Changes when the certificate does."""
        return os.stat(self.folder / CERTIFICATE).st_mtime_ns

    def describe(self) -> Description:
        """What this identity is."""
        path = self.folder / DESCRIPTION
        try:
            return decode(path.read_bytes(), Description)
        except (FileNotFoundError, msgspec.DecodeError) as error:
            raise NotFound(f"{path} can not be read: {error}", hint="It is written on joining.") from None

    def for_channel(self) -> grpc.ChannelCredentials:
        """Show the certificate, trust hosts alone."""
        return grpc.ssl_channel_credentials(
            root_certificates=self._read(HOSTS_CA),
            private_key=self._read(KEY),
            certificate_chain=self._read(CERTIFICATE),
        )

    def open_channel(self, address: str, options: Options = ()) -> grpc.Channel:
        """A channel for a command, to one flyd or (`ipv4:A,B,C`) the first of some that connects."""
        return open_channel(address, self.for_channel(), options)

    def for_server(self) -> grpc.ServerCredentials:
        """Show the certificate as it is at each handshake; ask everyone for theirs."""
        seen = self.version

        def configuration() -> Any:
            return grpc.ssl_server_certificate_configuration(
                [(self._read(KEY), self._read(CERTIFICATE))],
                root_certificates=self._read(HOSTS_CA) + self._read(CLIENTS_CA),
            )

        def renewed() -> Any:
            nonlocal seen
            if (now := self.version) == seen:
                return None
            seen = now
            return configuration()

        make = cast(Any, grpc).dynamic_ssl_server_credentials
        return make(configuration(), renewed, require_client_authentication=True)

    def _read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


class SecureChannel:
    """A channel that shows the newest certificate whenever it has to connect.

    Without credentials (a plain etcd beside pgha on its own) it is a plain channel.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials | None,
        options: tuple[tuple[str, Any], ...],
        name: str = "",
    ) -> None:
        self.address = address
        self._credentials = credentials
        self._options = options + ((("grpc.ssl_target_name_override", name),) if name else ())
        self._version = 0
        self._channel = self._make()

    def get(self) -> grpc.aio.Channel:
        """The channel; a new one if the certificate was renewed and the old one is not connected."""
        stale = self._credentials is not None and self._credentials.version != self._version
        if stale and self._channel.get_state() is not grpc.ChannelConnectivity.READY:
            self._channel = self._make()
        return self._channel

    async def close(self) -> None:
        """Close it."""
        await self._channel.close(None)

    def _make(self) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.address, options=self._options)
        self._version = self._credentials.version
        return grpc.aio.secure_channel(self.address, self._credentials.for_channel(), options=self._options)
