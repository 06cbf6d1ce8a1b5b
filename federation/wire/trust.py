"""Says who this process is and whom it believes: its certificate, the authorities, what is revoked.

Everything lies in files that may change at any time. They are looked at again at most once in
`LOOK_S`; what can't be used as it stands, such as a certificate whose key is not written yet,
leaves what was read before in force.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from federation.errors import Reason, ScenarioError
from federation.wire.party import Part, Party

LOOK_S = 1.0
"""How old what is known of the files may be."""

_SEEN = 4096
"""Certificates whose owner is remembered."""

_log = logging.getLogger(__name__)

_Stamp = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Files:
    """Where a process has its certificate (with those between it and its authority), the key, the
    authority of its city, what that has revoked, and the authorities of other cities.

    The last is a folder of `CITY.crt` and, where something was revoked, `CITY.crl`. All are PEM.
    """

    certificate: Path
    key: Path
    authority: Path
    revoked: Path
    peers: Path

    @classmethod
    def of(cls, folder: Path) -> Self:
        """In one folder, under the names that Kubernetes and cert-manager give them."""
        return cls(
            folder / "tls.crt",
            folder / "tls.key",
            folder / "ca.crt",
            folder / "ca.crl",
            folder / "peers",
        )

    def stamp(self) -> _Stamp:
        """Changes whenever one of the files does."""
        found: list[tuple[str, int, int, int]] = []
        own = (self.certificate, self.key, self.authority, self.revoked)
        peers = sorted(self.peers.iterdir()) if self.peers.is_dir() else []
        for file in (*own, *peers):
            try:
                is_ = file.stat()
            except OSError:
                continue
            found.append((str(file), is_.st_mtime_ns, is_.st_ino, is_.st_size))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Material:
    """What the files said when they were last read and fitted together."""

    party: Party
    certificate: bytes
    """With those between it and the authority."""
    key: bytes
    until_s: float
    """When the certificate expires, in Unix seconds."""
    serial: int
    authorities: Mapping[str, tuple[x509.Certificate, ...]]
    """Who may speak for which city."""
    revoked: frozenset[tuple[str, int]]
    """Cities and serial numbers of certificates that don't count any more."""

    def roots(self, city: str | None = None) -> bytes:
        """The authorities of a city, or of all, as gRPC wants them."""
        chosen = self.authorities if city is None else {city: self.authorities.get(city, ())}
        return b"".join(c.public_bytes(Encoding.PEM) for cs in chosen.values() for c in cs)


@dataclass(slots=True)
class Bearer:
    """Whose certificate it is, for as long as it counts."""

    party: Party
    serial: int
    since_s: float
    until_s: float


@dataclass(slots=True, eq=False)
class Trust:
    """An identity of this process, and whom it believes. Safe to use from any thread.

    Fails with MISSING_FILE and CERTIFICATE_INVALID when the files are of no use at the beginning.
    """

    files: Files
    now_s: Callable[[], float] = time.time
    _material: Material = field(init=False)
    _stamp: _Stamp = field(init=False)
    _refused: _Stamp = field(init=False, default=())
    """Of files that did not fit together, and were complained of."""
    _looked_s: float = field(init=False)
    _seen: dict[bytes, Bearer] = field(init=False, default_factory=dict)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._stamp = self.files.stamp()
        self._material = _read(self.files)
        self._looked_s = time.monotonic()

    @classmethod
    def of(cls, folder: Path | str) -> Trust:
        return cls(Files.of(Path(folder)))

    @property
    def party(self) -> Party:
        """Who this process is."""
        return self.material().party

    def material(self) -> Material:
        """What is in force. It is the same object until the files have changed."""
        with self._lock:
            if time.monotonic() - self._looked_s >= LOOK_S:
                self._looked_s = time.monotonic()
                self._look()
            return self._material

    def _look(self) -> None:
        stamp = self.files.stamp()
        if stamp in (self._stamp, self._refused):
            return
        self._refused = stamp
        try:
            fresh = _read(self.files)
        except ScenarioError as error:
            _log.warning("what was read before stays in force: %s", error)
            return
        if fresh.party != self._material.party:
            _log.warning(
                "what was read before stays in force: %s is not %s",
                fresh.party,
                self._material.party,
            )
            return
        self._stamp, self._material = stamp, fresh
        self._seen.clear()

    def bearer(self, certificate: bytes) -> Bearer:
        """Whose certificate (PEM) this is. Fails with NOT_AUTHENTICATED.

        Its key was proven by the handshake. Here it is held to the authority of the city that it
        names, since the authority of one city must not speak for another.
        """
        material = self.material()
        bearer = self._seen.get(certificate)
        if bearer is None:
            bearer = _bearer(certificate, material)
            if len(self._seen) >= _SEEN:
                self._seen.clear()
            self._seen[certificate] = bearer
        self.check(bearer, material)
        return bearer

    def check(self, bearer: Bearer, material: Material | None = None) -> None:
        """Refuse, with NOT_AUTHENTICATED, what has expired or was revoked since."""
        material = material or self.material()
        now_s = self.now_s()
        if (bearer.party.city, bearer.serial) in material.revoked:
            raise unproven(
                "REVOKED", f"the certificate of {bearer.party} was revoked", bearer.party
            )
        if now_s > bearer.until_s:
            raise unproven(
                "EXPIRED",
                f"the certificate of {bearer.party} expired at {instant(bearer.until_s)}",
                bearer.party,
            )
        if now_s < bearer.since_s:
            raise unproven(
                "NOT_YET_VALID",
                f"the certificate of {bearer.party} counts from {instant(bearer.since_s)} on",
                bearer.party,
            )

    def is_revoked(self, bearer: Bearer) -> bool:
        return (bearer.party.city, bearer.serial) in self.material().revoked

    def check_self(self) -> None:
        """Refuse, with NOT_AUTHENTICATED, to speak under what nobody would believe."""
        material = self.material()
        self.check(Bearer(material.party, material.serial, 0.0, material.until_s), material)


def unproven(cause: str, message: str, party: Party | None = None) -> ScenarioError:
    """NOT_AUTHENTICATED. The `cause` in its metadata is as stable as a reason."""
    metadata = {"cause": cause}
    if party is not None:
        metadata["identity"] = party.uri
    return ScenarioError(Reason.NOT_AUTHENTICATED, message, metadata)


def instant(time_s: float) -> str:
    """Unix seconds for a person, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))


def party_of(certificate: x509.Certificate) -> Party:
    """Whose it says that it is: its one URI. Fails with ValueError."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        raise ValueError("it has no names (subjectAltName)") from None
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise ValueError(f"it has {len(uris)} URIs among its names; it takes exactly one")
    return Party.read(uris[0])


_ODD = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What the library says of bytes that are no certificate, or one of a kind that it can't read."""


def _bearer(pem: bytes, material: Material) -> Bearer:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        party = party_of(certificate)
    except _ODD as error:
        raise unproven("NAMELESS", f"a certificate names nobody here: {error}") from None
    authorities = material.authorities.get(party.city, ())
    if not any(_is_issued_by(certificate, authority) for authority in authorities):
        knows = ", ".join(sorted(material.authorities))
        raise unproven(
            "FOREIGN",
            f"a certificate says that it is {party}, and no authority of {party.city} has issued "
            f"it; authorities are known of: {knows}",
            party,
        )
    return Bearer(
        party,
        certificate.serial_number,
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )


def _is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return True


def _read(files: Files) -> Material:
    certificate, key = _content(files.certificate), _content(files.key)
    try:
        chain = x509.load_pem_x509_certificates(certificate)
        party = party_of(chain[0])
        pair = load_pem_private_key(key, None).public_key() == chain[0].public_key()
    except (ValueError, TypeError) as error:
        raise _unusable(f"{files.certificate} and {files.key}: {error}", files) from error
    if not pair:
        raise _unusable(f"{files.key} is not the key of {files.certificate}", files)
    authorities = {party.city: _authorities(files.authority)}
    revoked = _revoked(party.city, files.revoked, authorities[party.city])
    for file in sorted(files.peers.glob("*.crt")):
        try:
            city = Party.of(file.stem, Part.BROKER, "x").city
        except ValueError as error:
            raise _unusable(f"{file}: {error}", files) from None
        if city == party.city:
            raise _unusable(f"{file} would let others speak for {city}, which is ours", files)
        authorities[city] = _authorities(file)
        revoked |= _revoked(city, file.with_suffix(".crl"), authorities[city])
    return Material(
        party,
        certificate,
        key,
        chain[0].not_valid_after_utc.timestamp(),
        chain[0].serial_number,
        authorities,
        frozenset(revoked),
    )


def _authorities(file: Path) -> tuple[x509.Certificate, ...]:
    try:
        return tuple(x509.load_pem_x509_certificates(_content(file)))
    except ValueError as error:
        raise ScenarioError(
            Reason.CERTIFICATE_INVALID,
            f"{file} holds no certificates: {error}",
            {"file": str(file)},
        ) from error


def _revoked(
    city: str, file: Path, authorities: tuple[x509.Certificate, ...]
) -> set[tuple[str, int]]:
    """What the authority of a city has revoked: nothing when it has no list."""
    if not file.is_file():
        return set()
    try:
        revoked = x509.load_pem_x509_crl(file.read_bytes())
        signed = any(_has_signed(revoked, authority) for authority in authorities)
    except ValueError as error:
        raise ScenarioError(
            Reason.CERTIFICATE_INVALID, f"{file} is no list: {error}", {"file": str(file)}
        ) from error
    if not signed:
        raise ScenarioError(
            Reason.CERTIFICATE_INVALID,
            f"{file} was not signed by an authority of {city}",
            {"file": str(file)},
        )
    until = revoked.next_update_utc
    if until is not None and until < datetime.now(until.tzinfo):
        _log.warning("%s should have been replaced by %s; it counts all the same", file, until)
    return {(city, each.serial_number) for each in revoked}


def _has_signed(revoked: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    try:
        return revoked.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    except TypeError:  # it has a key that signs no lists
        return False


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ScenarioError(
            Reason.MISSING_FILE,
            f"can't read {file}: {os.strerror(error.errno or 0)}; make certificates with: "
            "multitwin certs",
            {"file": str(file)},
        ) from None


def _unusable(message: str, files: Files) -> ScenarioError:
    return ScenarioError(
        Reason.CERTIFICATE_INVALID, message, {"certificate": str(files.certificate)}
    )
