"""A certificate authority for development: what makes the certificates that `trust` reads.

It is a folder. What is issued to somebody lies in `PART/NAME`, ready to be given to `--tls`;
copies of the certificates alone are kept in `issued`, so that they can be revoked. Keys are on the
curve P-256, which every TLS library takes, and only their owner can read them.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from federation.errors import Reason, ScenarioError
from federation.wire.party import Part, Party
from federation.wire.trust import Files, party_of

AUTHORITY_DAYS = 3650
LEAF_DAYS = 30

SKEW = timedelta(minutes=5)
"""How far another clock may be behind ours and still take what was issued just now."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was issued, and when it was revoked if it was."""

    party: Party
    serial: int
    until: datetime
    revoked: datetime | None

    def state(self, now: datetime) -> str:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.until < now else "valid"


class Authority:
    """The authority of one city, in a folder."""

    def __init__(
        self,
        folder: Path,
        city: str,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
    ) -> None:
        self.folder = folder
        self.city = city
        self._key = key
        self.certificate = certificate

    @classmethod
    def create(cls, folder: Path, city: str, now: datetime | None = None) -> Self:
        """Make one. Fails with SCENARIO_INVALID when there is one, or the city has no such name."""
        now = now or datetime.now(UTC)
        try:
            Party.of(city, Part.BROKER, "x")
        except ValueError as error:
            raise ScenarioError(Reason.SCENARIO_INVALID, str(error)) from None
        if (folder / "ca.key").exists():
            raise ScenarioError(
                Reason.SCENARIO_INVALID, f"{folder} is an authority already", {"file": str(folder)}
            )
        key = ec.generate_private_key(ec.SECP256R1())
        name = _subject(f"authority of {city}")
        certificate = (
            _builder(name, name, key.public_key(), now, timedelta(days=AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(is_authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .sign(key, SHA256())
        )
        folder.mkdir(parents=True, exist_ok=True)
        _write_secret(folder / "ca.key", key)
        _write(folder / "ca.crt", certificate.public_bytes(Encoding.PEM))
        authority = cls(folder, city, key, certificate)
        authority._write_revoked({}, now)
        return authority

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Fails with MISSING_FILE and CERTIFICATE_INVALID."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
            key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
        except FileNotFoundError as error:
            raise ScenarioError(
                Reason.MISSING_FILE,
                f"there is no {error.filename}; make an authority with: multitwin certs init "
                f"{folder} --city CITY",
                {"file": str(error.filename)},
            ) from None
        except (ValueError, TypeError) as error:
            raise _unusable(folder, str(error)) from error
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        city = str(names[0].value).rpartition(" ")[2] if names else ""
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not city:
            raise _unusable(folder, "it was not made by: multitwin certs init")
        return cls(folder, city, key, certificate)

    def issue(
        self, part: str, name: str, days: float = LEAF_DAYS, now: datetime | None = None
    ) -> Path:
        """Give somebody a certificate with a fresh key; the folder with all that a process needs.

        What they had before counts on until it expires or is revoked; a process that reads this
        folder takes the new one without a restart. Fails with SCENARIO_INVALID.
        """
        now = now or datetime.now(UTC)
        try:
            party = Party.of(self.city, part, name)
        except ValueError as error:
            raise ScenarioError(Reason.SCENARIO_INVALID, str(error)) from None
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.UniformResourceIdentifier(party.uri), *map(x509.DNSName, party.hosts)]
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        issuer = self.certificate
        certificate = (
            _builder(
                _subject(f"{part} {name}"),
                issuer.subject,
                key.public_key(),
                now,
                timedelta(days=days),
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(is_authority=False), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False
            )
            .sign(self._key, SHA256())
        )
        pem = certificate.public_bytes(Encoding.PEM)
        (self.folder / "issued").mkdir(exist_ok=True)
        _write(self.folder / "issued" / f"{certificate.serial_number:x}.crt", pem)
        home = self.folder / part / name
        home.mkdir(parents=True, exist_ok=True)
        files = Files.of(home)
        _write_secret(files.key, key)
        _write(files.certificate, pem)
        _write(files.authority, issuer.public_bytes(Encoding.PEM))
        _write(files.revoked, (self.folder / "ca.crl").read_bytes())
        return home

    def revoke(
        self, part: str, name: str, serial: int | None = None, now: datetime | None = None
    ) -> tuple[Issued, ...]:
        """Let no certificate of somebody count any more, or the one with this serial number; those
        that were revoked now. Fails with UNKNOWN_ENTITY when there are none.

        Everybody to whom this authority has issued something has the new list at once.
        """
        now = now or datetime.now(UTC)
        there = {issued.serial: issued for issued in self.issued()}
        meant = tuple(
            issued
            for issued in there.values()
            if issued.party == (self.city, part, name)
            and issued.revoked is None
            and serial in (None, issued.serial)
        )
        if not meant:
            raise ScenarioError(
                Reason.UNKNOWN_ENTITY,
                f"{part} {name} has no certificate of {self.folder} to revoke",
                {"part": part, "name": name},
            )
        revoked = {one.serial: one.revoked for one in there.values() if one.revoked is not None}
        self._write_revoked(revoked | {one.serial: now for one in meant}, now)
        return meant

    def issued(self) -> tuple[Issued, ...]:
        """All that it has issued, by name and time."""
        revoked = {
            each.serial_number: each.revocation_date_utc
            for each in x509.load_pem_x509_crl((self.folder / "ca.crl").read_bytes())
        }
        found = []
        for file in (self.folder / "issued").glob("*.crt"):
            certificate = x509.load_pem_x509_certificate(file.read_bytes())
            serial = certificate.serial_number
            until = certificate.not_valid_after_utc
            found.append(Issued(party_of(certificate), serial, until, revoked.get(serial)))
        return tuple(sorted(found, key=lambda issued: (issued.party, issued.until, issued.serial)))

    def _write_revoked(self, revoked: dict[int, datetime], now: datetime) -> None:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now)
            .next_update(now + timedelta(days=AUTHORITY_DAYS))
        )
        for serial, since in sorted(revoked.items()):
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(serial)
                .revocation_date(since)
                .build()
            )
        pem = builder.sign(self._key, SHA256()).public_bytes(Encoding.PEM)
        _write(self.folder / "ca.crl", pem)
        for part in Part:
            for home in (self.folder / part).glob("*/tls.crt"):
                _write(home.with_name("ca.crl"), pem)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    span: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + span) - SKEW)
        .not_valid_after(now + span)
    )


def _subject(name: str) -> x509.Name:
    # a common name has at most 64 characters; whom a certificate names is its URI
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[-64:])])


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _write_secret(file: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _write(file, pem, 0o600)


def _write(file: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace a file in one go, so that no reader ever sees half of it."""
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as out:
        out.write(content)
    fresh.replace(file)


def _unusable(folder: Path, why: str) -> ScenarioError:
    return ScenarioError(
        Reason.CERTIFICATE_INVALID, f"{folder} is no authority: {why}", {"file": str(folder)}
    )
