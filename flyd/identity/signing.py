"""Signing in a process of its own: `python -m flyd.identity.signing`, one request in, one answer out.

`cryptography` takes 20 MB of memory that a daemon which signs once in two months should not
hold. `sign` is for daemons; commands call flyd/identity/certificates.py itself.
"""

from __future__ import annotations

import asyncio
import sys

import msgspec

from flyd.errors import InvalidInput, Unavailable
from flyd.identity.subjects import Subject
from flyd.model import Authority, Value

TIMEOUT_S = 20.0


class Issue(Value, frozen=True, kw_only=True, tag=True):
    """Sign a certificate for a public key."""

    authority: Authority
    public_key: str
    subject: Subject
    addresses: tuple[str, ...] = ()
    now_s: float
    lifetime_s: float


class Revoke(Value, frozen=True, kw_only=True, tag=True):
    """Write the list of refused certificates."""

    authority: Authority
    serials: tuple[str, ...]
    now_s: float


class MakeToken(Value, frozen=True, kw_only=True, tag=True):
    """Make a join token's key and certificate, as the token's text."""

    authority: Authority
    hosts_certificate: str
    token_id: str
    api: tuple[str, ...]
    now_s: float
    lifetime_s: float


class Signed(Value, frozen=True, kw_only=True):
    """The answer: what was signed (PEM, or a token's text), or why not."""

    text: str = ""
    serial: str = ""
    expires_at_s: float = 0.0
    error: str = ""


def carry_out(request: Issue | Revoke | MakeToken) -> Signed:
    """Do what is asked, here."""
    from flyd.identity import certificates
    from flyd.identity.tokens import token_text

    if isinstance(request, Revoke):
        return Signed(text=certificates.revocation_list(request.authority, request.serials, request.now_s))
    if isinstance(request, MakeToken):
        return Signed(
            text=token_text(
                request.authority,
                request.hosts_certificate,
                request.token_id,
                request.api,
                now_s=request.now_s,
                lifetime_s=request.lifetime_s,
            )
        )
    issued = certificates.issue(
        request.authority,
        request.public_key,
        request.subject,
        request.addresses,
        now_s=request.now_s,
        lifetime_s=request.lifetime_s,
    )
    return Signed(text=issued.certificate_pem, serial=issued.serial, expires_at_s=issued.expires_at_s)


async def sign(request: Issue | Revoke | MakeToken) -> Signed:
    """Do what is asked in a process of its own.

    InvalidInput says what is wrong with the request, Unavailable why the process gave no answer.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flyd.identity.signing"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            out, err = await process.communicate(msgspec.json.encode(request))
    except TimeoutError:
        raise Unavailable(
            f"signing did not end within {TIMEOUT_S:g} s", hint="The host is overloaded."
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        said = err.decode(errors="replace").strip()[-500:]
        raise Unavailable(f"signing failed: {said}", hint="Is `cryptography` installed beside flyd?")
    answer = msgspec.json.decode(out, type=Signed)
    if answer.error:
        raise InvalidInput(answer.error)
    return answer


def main() -> None:
    """The child: standard input to standard output."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Issue | Revoke | MakeToken)
    try:
        answer = carry_out(request)
    except InvalidInput as error:
        answer = Signed(error=error.message)
    sys.stdout.buffer.write(msgspec.json.encode(answer))


if __name__ == "__main__":
    main()
