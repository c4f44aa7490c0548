"""The image that `fly deploy` deploys, made or found on the caller's own machine.

Works through the `docker` command and not the SDK: the command knows the user's context, credentials
and builder. BuildKit builds where it is there, else the engine's classic builder. The image is
handed on as an archive (archive.py), which is not made before it is needed: an engine that keeps
its images in its own store tells id and layers without one.

Called by flyd/cli/images.py. Talks to no flyd.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from flyd.errors import InvalidInput, Unavailable
from flyd.images.archive import open_archive
from flyd.images.layers import bare
from flyd.model import Value

SHOWN_LINES = 20  # of a failed build
UNSUPPORTED = ("builder", "buildpacks", "builtin")
CONTAINERD = "io.containerd.snapshotter"
HOST_NETWORK = ("--network", "host")  # apt and pip work also where containers have no way out
# How each builder is called, and what must be in the environment.
BUILDX = ("buildx", "build", "--progress", "plain", "--load"), {"BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
BUILDKIT = ("build", "--progress", "plain"), {"DOCKER_BUILDKIT": "1"}
CLASSIC = ("build", "--force-rm"), {"DOCKER_BUILDKIT": "0"}
BUILDX_ONLY_SINCE = 23  # older commands have BuildKit in themselves

OnLine = Callable[[str], None]


class LocalImage(Value, frozen=True, kw_only=True):
    """An image on this machine: in the engine under `name`, or in the file `archive`."""

    image_id: str
    layers: tuple[str, ...]
    name: str = ""
    archive: str = ""


def take(directory: Path, app: str, build: Mapping[str, Any], tmp: Path, on_line: OnLine) -> LocalImage:
    """What fly.toml's [build] names, else what the Dockerfile makes."""
    for key in UNSUPPORTED:
        if key in build:
            raise InvalidInput(
                f"[build] {key} is not supported: flyd has no buildpacks",
                hint="Write a Dockerfile, or name a finished image: [build] image in fly.toml.",
            )
    image = build.get("image")
    if image is not None:
        return _named(directory, _text(build, "image"), tmp, on_line)
    return identify(build_image(directory, app, build, on_line), tmp)


def _named(directory: Path, image: str, tmp: Path, on_line: OnLine) -> LocalImage:
    path = directory / image
    if image.endswith(".tar"):
        with open_archive(path) as archive:
            return LocalImage(image_id=archive.image_id, layers=archive.layers, archive=str(path))
    if not _works("image", "inspect", image):
        docker(("pull", image), on_line, f"the image {image} is not on this machine and can not be pulled")
    return identify(image, tmp)


def build_image(directory: Path, app: str, build: Mapping[str, Any], on_line: OnLine) -> str:
    """Build the app's Dockerfile with the local engine; the image's name."""
    dockerfile = directory / (_text(build, "dockerfile") or "Dockerfile")
    if not dockerfile.is_file():
        raise InvalidInput(
            f"there is no {dockerfile}",
            hint="The hosts run containers: write a Dockerfile, or name an image: [build] image.",
        )
    name = f"fly-{app}:latest"
    words, environment = builder()
    command = [*words, *HOST_NETWORK, "--tag", name]
    if target := _text(build, "build-target") or _text(build, "build_target"):
        command += ["--target", target]
    for key, value in sorted(_args(build).items()):
        command += ["--build-arg", f"{key}={value}"]
    failure = "the build failed"
    if ignorefile := _text(build, "ignorefile"):
        with _context(directory, dockerfile, directory / ignorefile) as packed:
            inside = os.path.relpath(dockerfile, directory)
            docker((*command, "--file", inside, "-"), on_line, failure, environment, packed)
    else:
        docker((*command, "--file", str(dockerfile), str(directory)), on_line, failure, environment)
    return name


def identify(name: str, tmp: Path) -> LocalImage:
    """The id and layers of an image in the local engine.

    An engine with containerd's store names images by their manifest: there only an archive tells.
    """
    status = _output(("info", "--format", "{{json .DriverStatus}}"))
    if CONTAINERD in status:
        path = save(name, tmp)
        with open_archive(path) as archive:
            return LocalImage(image_id=archive.image_id, layers=archive.layers, archive=str(path))
    found = cast("list[dict[str, Any]]", msgspec.json.decode(_output(("image", "inspect", name))))[0]
    layers = cast("list[str]", found["RootFS"].get("Layers") or [])
    return LocalImage(image_id=bare(found["Id"]), layers=tuple(bare(layer) for layer in layers), name=name)


def save(name: str, tmp: Path) -> Path:
    """The image as an archive in `tmp`."""
    path = tmp / "image.tar"
    docker(("save", "--output", str(path), name), lambda _: None, f"{name} could not be saved")
    return path


def docker(
    arguments: Sequence[str],
    on_line: OnLine,
    failure: str,
    environment: Mapping[str, str] | None = None,
    stdin: IO[bytes] | None = None,
) -> None:
    """Run the docker command; each line of its output as it comes, the last ones in the error."""
    last: deque[str] = deque(maxlen=SHOWN_LINES)
    try:
        process = subprocess.Popen(
            ("docker", *arguments),
            stdin=stdin or subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {})},
        )
    except FileNotFoundError:
        raise _no_docker() from None
    with process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if text := line.rstrip():
                    last.append(text)
                    on_line(text)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        shown = "\n".join(f"  {line}" for line in last)
        if "Cannot connect to the Docker daemon" in shown or "permission denied" in shown.lower():
            raise Unavailable(f"{failure}:\n{shown}", hint=ENGINE_HINT)
        raise InvalidInput(f"{failure}:\n{shown}")


ENGINE_HINT = "Does an engine run here (`docker version`), and may you use it (group docker)?"


def _no_docker() -> Unavailable:
    return Unavailable(
        "there is no `docker` command on this machine, and the cluster's hosts run containers",
        hint='Install Docker here, or deploy a finished image: [build] image = "FILE.tar" in fly.toml.',
    )


def _output(arguments: Sequence[str]) -> str:
    """What a quick docker command prints."""
    try:
        done = subprocess.run(("docker", *arguments), capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise _no_docker() from None
    if done.returncode:
        raise Unavailable(f"docker {arguments[0]}: {done.stderr.strip()}", hint=ENGINE_HINT)
    return done.stdout


def _works(*arguments: str) -> bool:
    """Whether a quick docker command succeeds."""
    try:
        return subprocess.run(("docker", *arguments), capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        raise _no_docker() from None


def builder() -> tuple[tuple[str, ...], dict[str, str]]:
    """The best builder that this machine's docker command has."""
    if _works("buildx", "version"):
        return BUILDX
    major = _output(("version", "--format", "{{.Client.Version}}")).partition(".")[0]
    return BUILDKIT if major.isdecimal() and int(major) < BUILDX_ONLY_SINCE else CLASSIC


def _context(directory: Path, dockerfile: Path, ignorefile: Path) -> IO[bytes]:
    """The folder as a tar without what that file names: builders look for .dockerignore only."""
    from docker.utils import build as contexts  # the SDK is slow to import, and rarely needed here

    try:
        patterns = ignorefile.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"[build] ignorefile: {ignorefile}: {error}") from error
    inside = os.path.relpath(dockerfile, directory)
    if inside.startswith(".."):
        raise InvalidInput(
            f"[build] ignorefile needs the Dockerfile inside {directory}, and it is {dockerfile}"
        )
    exclude = [p.strip() for p in patterns if p.strip() and not p.startswith("#")]
    packed: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    cast(Any, contexts).tar(
        str(directory), exclude=exclude, dockerfile=(inside, None), fileobj=packed, gzip=True
    )
    packed.seek(0)
    return packed


def _text(build: Mapping[str, Any], key: str) -> str:
    value: object = build.get(key, "")
    if not isinstance(value, str):
        raise InvalidInput(f"[build] {key} is {value!r}: it must be text")
    return value


def _args(build: Mapping[str, Any]) -> dict[str, str]:
    given: object = build.get("args") or {}
    if not isinstance(given, Mapping):
        raise InvalidInput('[build] args must be a table: [build.args] NAME = "value"')
    return {str(key): str(value) for key, value in cast("Mapping[object, object]", given).items()}
