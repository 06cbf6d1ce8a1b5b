"""Shakes hands by hand: finds out who is at an address, or why nobody there can be trusted.

gRPC reports little of what goes wrong in a handshake, and knows of no revocation. A greeting tells
a sentence and a cause.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress

from cryptography import x509

from federation.errors import FederationError, Reason, ScenarioError
from federation.wire.footing import place_of, present
from federation.wire.party import Party
from federation.wire.trust import Bearer, Material, Trust, party_of, unproven

_PLAIN_ERRORS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")
"""What OpenSSL makes of an end that does not speak TLS."""

_CAUSES = {9: "NOT_YET_VALID", 10: "EXPIRED", 18: "SELF_SIGNED", 19: "SELF_SIGNED"}
"""Why OpenSSL takes a certificate for none (its X509_V_ERR numbers); all else is FOREIGN."""


async def greet(address: str, expects: Party, trust: Trust) -> None:
    """Shake hands with who is at `address`, and see that it is who it should be.

    Fails with NOT_AUTHENTICATED, whose `cause` says why: ours or theirs is EXPIRED, NOT_YET_VALID
    or REVOKED; theirs is SELF_SIGNED, FOREIGN, NAMELESS or OTHER_NAME; they speak PLAIN_TEXT; or
    they have ended the connection on seeing ours, REFUSED. Fails with OSError when nobody is there.
    """
    try:
        await _greet(address, expects, trust)
    except FederationError as error:
        if error.metadata.get("cause") != "REFUSED":
            raise
        # who ends just now does the same; it is not there the second time
        await asyncio.sleep(0.05)
        await _greet(address, expects, trust)


async def _greet(address: str, expects: Party, trust: Trust) -> None:
    trust.check_self()
    material = trust.material()
    host, port = place_of(address)
    try:
        context = _client_context(trust, material, expects.city)
    except OSError:
        return  # our files are just being replaced: gRPC goes on with what was read before
    try:
        reader, writer = await asyncio.open_connection(
            host, port, ssl=context, server_hostname=expects.host
        )
    except ssl.SSLError as error:
        raise _handshake_failed(address, error, expects) from None
    try:
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        _check_owner(address, x509.load_der_x509_certificate(der), expects, trust, material)
        # with TLS 1.3 the other end judges our certificate after we think that all is well; a
        # server of gRPC then speaks first
        try:
            heard = await reader.read(1)
        except OSError:
            heard = b""
        if not heard:
            raise unproven(
                "REFUSED",
                f"{address} ends the connection when it sees the certificate of {material.party}: "
                "it knows another authority, or takes none in the clear",
                material.party,
            )
    finally:
        writer.transport.abort()


def _client_context(trust: Trust, material: Material, city: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False  # who it is stands in a URI, which is looked at afterwards
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    roots = material.roots(city).decode()
    if roots:
        context.load_verify_locations(cadata=roots)
    context.load_cert_chain(trust.files.certificate, trust.files.key)
    context.set_alpn_protocols(["h2"])
    return context


def _handshake_failed(address: str, error: ssl.SSLError, expects: Party) -> FederationError:
    if isinstance(error, ssl.SSLCertVerificationError):
        cause = _CAUSES.get(error.verify_code, "FOREIGN")
        return unproven(
            cause,
            f"{address} is not taken for {expects}: its certificate says nothing to us "
            f"({error.verify_message})",
            expects,
        )
    if error.reason in _PLAIN_ERRORS:
        return unproven(
            "PLAIN_TEXT",
            f"{address} speaks plain text and can't show that it is {expects}",
            expects,
        )
    return unproven(
        "REFUSED", f"{address} broke the handshake off: {error.reason or error}", expects
    )


def _check_owner(
    address: str, shown: x509.Certificate, expects: Party, trust: Trust, material: Material
) -> None:
    try:
        party = party_of(shown)
    except ValueError as error:
        raise unproven("NAMELESS", f"{address} has a certificate, and {error}") from None
    if not expects.is_met_by(party):
        raise unproven("OTHER_NAME", f"{address} is {party}, where {expects} is expected", party)
    since_s, until_s = shown.not_valid_before_utc, shown.not_valid_after_utc
    bearer = Bearer(party, shown.serial_number, since_s.timestamp(), until_s.timestamp())
    trust.check(bearer, material)


async def plain_refusal(address: str) -> FederationError | None:
    """Why a call in the clear came to nothing, if that is since `address` speaks TLS only.

    Bounded in time; for when a call has failed.
    """
    if present().trust is not None or address.startswith("unix"):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is said, only heard whether it is TLS
    with suppress(OSError, TimeoutError, ValueError):
        async with asyncio.timeout(0.5):
            host, port = place_of(address)
            _, writer = await asyncio.open_connection(host, port, ssl=context)
            writer.transport.abort()
        return ScenarioError(
            Reason.PLAIN_TEXT_REFUSED,
            f"{address} speaks TLS, and this process has no certificate to show: give --tls DIR "
            "(see multitwin certs)",
            {"address": address},
        )
    return None
