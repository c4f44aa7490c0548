"""The images of one host's Docker engine, as the few blocking calls that moving them needs.

flyd marks the images that it put there (or found there and relies on) with a tag of its own,
MARK:<id>: `docker image prune` leaves them, and flyd removes no others. Called from threads by
store.py. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from docker import APIClient
from docker.errors import APIError, ImageNotFound

from flyd.drivers.docker.engine import DEFAULT_URL
from flyd.drivers.docker.errors import translated
from flyd.errors import Refused
from flyd.images.layers import bare
from flyd.model import HeldImage

MARK = "flyd.local/image"
CALL_TIMEOUT_S = 600  # loading and saving: the engine answers only when it has unpacked a layer
CONNECTIONS = 8
READ_BYTES = 1024 * 1024


class ImageEngine:
    """One engine; usable from several threads."""

    def __init__(self, host_name: str, url: str = DEFAULT_URL) -> None:
        self._host = host_name
        self._url = url
        self._connected: Any = None  # an APIClient; the SDK's calls for images carry no types

    @property
    def _client(self) -> Any:
        """Made at the first call, so that flyd starts also while its engine is down."""
        if self._connected is None:
            self._connected = APIClient(
                base_url=self._url, version="auto", timeout=CALL_TIMEOUT_S, max_pool_size=CONNECTIONS
            )
        return self._connected

    def close(self) -> None:
        """Give up the connections."""
        if self._connected is not None:
            self._connected.close()

    def inspect(self, image_id: str) -> tuple[tuple[str, ...], int] | None:
        """An image's layers and its size in bytes; None if it is not here."""
        with translated(self._host, f"look at image {image_id[:12]}"):
            try:
                found: dict[str, Any] = self._client.inspect_image(f"sha256:{image_id}")
            except ImageNotFound:
                return None
        return _layers(found), int(found["Size"])

    def all_layers(self) -> tuple[tuple[str, ...], ...]:
        """The layers of every image, those without a name too."""
        with translated(self._host, "list images"):
            listed: list[str] = self._client.images(all=True, quiet=True)
            found: list[tuple[str, ...]] = []
            for image in sorted(set(listed)):
                try:
                    found.append(_layers(self._client.inspect_image(image)))
                except ImageNotFound:  # removed meanwhile
                    continue
        return tuple(found)

    def load(self, image_id: str, archive: Iterator[bytes]) -> None:
        """Give the engine an archive; `Refused` if it does not take it, and then it has nothing of it."""
        what = f"load image {image_id[:12]}"
        with translated(self._host, what):
            answers: Iterator[dict[str, Any]] = self._client.load_image(archive, quiet=True)
            errors = [str(answer["error"]) for answer in answers if "error" in answer]
        if errors:
            raise Refused(
                f"cannot {what} on host {self._host}: Docker says: {errors[0]}", hint="Deploy again."
            )

    def save(self, image_id: str, path: Path) -> None:
        """Write the image to a file, as `docker save` does."""
        with translated(self._host, f"save image {image_id[:12]}"), path.open("wb") as file:
            for data in self._client.get_image(f"sha256:{image_id}", chunk_size=READ_BYTES):
                file.write(data)

    def mark(self, image_id: str) -> None:
        """Take the image as flyd's own; its `since_s` is now."""
        with translated(self._host, f"mark image {image_id[:12]}"):
            self._client.tag(f"sha256:{image_id}", MARK, image_id)

    def marked(self) -> tuple[HeldImage, ...]:
        """The images that `mark` took."""
        with translated(self._host, "list images"):
            listed: list[dict[str, Any]] = self._client.images(name=MARK)
            held: list[HeldImage] = []
            for image in sorted(listed, key=lambda i: str(i["Id"])):
                seen = self._client.inspect_image(image["Id"])
                held.append(HeldImage(image_id=bare(image["Id"]), since_s=_tagged_at_s(seen)))
        return tuple(held)

    def remove(self, image_id: str) -> bool:
        """Take the mark away, and the image with it if nothing else names it; False: a container uses it."""
        with translated(self._host, f"remove image {image_id[:12]}"):
            try:
                self._client.remove_image(f"{MARK}:{image_id}")
            except ImageNotFound:
                return True
            except APIError as error:
                if error.status_code == 409:
                    return False
                raise
        return True


def _layers(inspected: dict[str, Any]) -> tuple[str, ...]:
    layers: list[str] = inspected["RootFS"].get("Layers") or []
    return tuple(bare(layer) for layer in layers)


def _tagged_at_s(inspected: dict[str, Any]) -> float:
    stamp = str(inspected["Metadata"]["LastTagTime"])
    return datetime.fromisoformat(stamp[:19] + "+00:00").timestamp()
