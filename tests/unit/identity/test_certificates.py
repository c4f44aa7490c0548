"""What the authorities sign, and what a token carries."""

from __future__ import annotations

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from flyd.errors import InvalidInput
from flyd.identity import certificates, signing, tokens
from flyd.identity.subjects import Subject, read_subject

NOW_S = 1_800_000_000.0
DAY_S = 86400.0
AUTHORITIES = certificates.new_authorities("c1", NOW_S, DAY_S)
HOST = Subject(kind="host", name="ams-1", membership="m1")


def issued(subject: Subject, addresses: tuple[str, ...] = ()) -> x509.Certificate:
    authority = AUTHORITIES.hosts if subject.kind == "host" else AUTHORITIES.clients
    made = certificates.issue(
        authority,
        certificates.public_key(certificates.new_key()),
        subject,
        addresses,
        now_s=NOW_S,
        lifetime_s=DAY_S,
    )
    return x509.load_pem_x509_certificate(made.certificate_pem.encode())


def test_a_host_is_named_by_its_names_and_addresses() -> None:
    certificate = issued(HOST, ("192.0.2.1", "10.211.0.1"))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["ams-1.host.flyd", "any.host.flyd"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.1", "10.211.0.1"]
    assert certificate.not_valid_after_utc.timestamp() == NOW_S + DAY_S


def test_only_hosts_may_answer() -> None:
    for subject, answers in ((HOST, True), (Subject(kind="user", name="u"), False)):
        usage = issued(subject).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert (ExtendedKeyUsageOID.SERVER_AUTH in usage) is answers
        assert ExtendedKeyUsageOID.CLIENT_AUTH in usage


def test_hosts_and_clients_have_authorities_of_their_own() -> None:
    hosts, clients = (
        x509.load_pem_x509_certificate(a.certificate_pem.encode())
        for a in (AUTHORITIES.hosts, AUTHORITIES.clients)
    )
    issued(HOST).verify_directly_issued_by(hosts)
    issued(Subject(kind="join", name="t")).verify_directly_issued_by(clients)
    with pytest.raises(ValueError):
        issued(Subject(kind="user", name="u")).verify_directly_issued_by(hosts)


@pytest.mark.parametrize(
    "text", ["", "no key", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]
)
def test_what_is_no_key_is_not_signed(text: str) -> None:
    with pytest.raises(InvalidInput):
        certificates.issue(AUTHORITIES.hosts, text, HOST, (), now_s=NOW_S, lifetime_s=DAY_S)


def test_a_key_of_another_kind_is_not_signed() -> None:
    key = rsa.generate_private_key(65537, 2048).public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(InvalidInput, match="elliptic curve"):
        certificates.issue(AUTHORITIES.hosts, pem, HOST, (), now_s=NOW_S, lifetime_s=DAY_S)


def test_refused_certificates_are_listed() -> None:
    pem = certificates.revocation_list(AUTHORITIES.hosts, ("ff", "1a2b"), NOW_S)
    listed = x509.load_pem_x509_crl(pem.encode())
    assert sorted(f"{r.serial_number:x}" for r in listed) == ["1a2b", "ff"]
    authority = x509.load_pem_x509_certificate(AUTHORITIES.hosts.certificate_pem.encode())
    key = authority.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert listed.is_signature_valid(key)


async def test_signing_in_a_process_of_its_own() -> None:
    key = certificates.public_key(certificates.new_key())
    request = signing.Issue(
        authority=AUTHORITIES.hosts, public_key=key, subject=HOST, now_s=NOW_S, lifetime_s=DAY_S
    )
    signed = await signing.sign(request)
    certificate = x509.load_pem_x509_certificate(signed.text.encode())
    assert certificate.subject.rfc4514_string() == "CN=host:ams-1:m1"
    assert signed.serial == f"{certificate.serial_number:x}"
    with pytest.raises(InvalidInput, match="not a public key"):
        await signing.sign(msgspec.structs.replace(request, public_key="nonsense"))


def test_a_token_carries_all_that_a_newcomer_needs() -> None:
    text = tokens.token_text(
        AUTHORITIES.clients,
        AUTHORITIES.hosts.certificate_pem,
        "t1",
        ["192.0.2.1:4280", "192.0.2.2:4280"],
        now_s=NOW_S,
        lifetime_s=60.0,
    )
    token = tokens.read_token(f"  {text[:300]}\n{text[300:]}\n")  # as a terminal wraps it
    assert token.api == ("192.0.2.1:4280", "192.0.2.2:4280")
    assert token.hosts_certificate == AUTHORITIES.hosts.certificate_pem
    certificate = x509.load_pem_x509_certificate(token.certificate.encode())
    assert certificate.subject.rfc4514_string() == "CN=join:t1"
    assert certificates.public_key(token.key)
    assert certificate.not_valid_after_utc.timestamp() == NOW_S + 60.0 + tokens.TOLD_FOR_S


@given(st.text(max_size=60) | st.text(alphabet="flyd1.abcXYZ-_", max_size=80).map("flyd1.".__add__))
def test_what_is_no_token_is_said_to_be_none(text: str) -> None:
    with pytest.raises(InvalidInput):
        tokens.read_token(text)


@given(st.integers(min_value=1, max_value=900))
def test_a_token_that_was_cut_off_is_refused(length: int) -> None:
    whole = TOKEN
    with pytest.raises(InvalidInput):
        tokens.read_token(whole[: min(length, len(whole) - 8)])


TOKEN = tokens.token_text(
    AUTHORITIES.clients, AUTHORITIES.hosts.certificate_pem, "t", ["a:1"], now_s=NOW_S, lifetime_s=1.0
)


@pytest.mark.parametrize(
    "subject", [HOST, Subject(kind="user", name="admin"), Subject(kind="join", name="t")]
)
def test_subjects_are_read_as_they_were_written(subject: Subject) -> None:
    assert read_subject(str(subject)) == subject


@pytest.mark.parametrize("name", ["", "host:ams-1", "user:a:b", "root:x", "host::m", "host"])
def test_other_names_are_nobodys(name: str) -> None:
    with pytest.raises(InvalidInput):
        read_subject(name)
