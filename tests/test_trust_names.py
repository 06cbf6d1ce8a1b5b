"""What certificates say, where they come from, and what becomes of files that are no good."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.__main__ import main
from federation.errors import Reason, ScenarioError
from federation.wire import footing, gate, trust
from federation.wire.authority import Authority
from federation.wire.footing import Footing, standing
from federation.wire.party import Part, Party
from federation.wire.trust import Files, Trust
from tests.guises import (
    city,
    serial,
)


@pytest.fixture(scope="module")
def shelby(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return city(tmp_path_factory.mktemp("shelby"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at ten times as often as usual, which spares the tests seconds."""
    monkeypatch.setattr(trust, "LOOK_S", 0.1)
    monkeypatch.setattr(gate, "LOOK_S", 0.1)


def test_files_that_do_not_fit_together_leave_what_was_read_before_in_force(
    quick: None, tmp_path: Path
) -> None:
    own = city(tmp_path / "shelby")
    home = own.folder / "twin" / "dams"
    files = Files.of(home)
    read = Trust(files)
    first = read.material()
    own.issue("twin", "dams")
    key = files.key.read_bytes()
    files.key.write_bytes((own.folder / "twin" / "town" / "tls.key").read_bytes())
    time.sleep(0.15)
    assert read.material() is first
    files.key.write_bytes(key)
    time.sleep(0.15)
    second = read.material()
    assert second.serial == serial(home) != first.serial
    # another one's certificate is no rotation
    for name in ("tls.key", "tls.crt"):
        (home / name).write_bytes((own.folder / "twin" / "town" / name).read_bytes())
    time.sleep(0.15)
    assert read.material() is second
    files.certificate.unlink()
    time.sleep(0.15)
    assert read.material() is second


def test_a_list_of_the_revoked_that_somebody_else_signed_does_not_count(tmp_path: Path) -> None:
    own, other = city(tmp_path / "shelby"), city(tmp_path / "other", "other")
    home = own.folder / "twin" / "dams"
    (home / "ca.crl").write_bytes((other.folder / "ca.crl").read_bytes())
    with pytest.raises(ScenarioError, match="not signed by an authority of shelby") as caught:
        Trust.of(home)
    assert caught.value.reason is Reason.CERTIFICATE_INVALID
    (home / "ca.crl").unlink()
    peers = home / "peers"
    peers.mkdir()
    (peers / "shelby.crt").write_bytes((other.folder / "ca.crt").read_bytes())
    with pytest.raises(ScenarioError, match="which is ours"):
        Trust.of(home)


LABELS = st.from_regex(r"[a-z][a-z0-9_-]{0,20}", fullmatch=True)
PARTS = st.sampled_from([part for part in Part if part is not Part.PEER])


@pytest.mark.property
@given(LABELS, PARTS, LABELS)
def test_a_party_is_read_as_it_is_written(city_: str, part: Part, name: str) -> None:
    try:
        party = Party.of(city_, part, name)
    except ValueError:
        assert city_ in list(Part)
        return
    assert Party.read(party.uri) == party
    assert party.is_met_by(party)
    assert party._replace(name="").is_met_by(party)


@pytest.mark.property
@given(st.tuples(LABELS, PARTS, LABELS), st.tuples(LABELS, PARTS, LABELS))
def test_two_parties_never_have_a_host_in_common_unless_they_are_of_one_part(
    one: tuple[str, Part, str], other: tuple[str, Part, str]
) -> None:
    try:
        a, b = Party.of(*one), Party.of(*other)
    except ValueError:
        return
    assert (a.host in b.hosts) == (a == b)
    assert (a.hosts[1] in b.hosts) == (a[:2] == b[:2])


@pytest.mark.property
@given(st.one_of(st.text(), st.text().map(lambda rest: f"spiffe://{rest}")))
def test_what_is_no_name_is_said_to_be_none(text: str) -> None:
    try:
        party = Party.read(text)
    except ValueError:
        return
    assert party.uri == text


@pytest.mark.property
@given(st.binary(max_size=200), st.integers(0, 3))
def test_garbage_is_nobodys_certificate(data: bytes, wrap: int) -> None:
    pem = (
        data
        if not wrap
        else (
            b"-----BEGIN CERTIFICATE-----\n"
            + data.hex().encode()
            + b"\n-----END CERTIFICATE-----\n"
        )
    )
    with pytest.raises(ScenarioError) as caught:
        READER[0].bearer(pem)
    assert caught.value.reason is Reason.NOT_AUTHENTICATED


READER: list[Trust] = []


@pytest.fixture(autouse=True, scope="module")
def _reader(shelby: Authority) -> None:
    READER[:] = [Trust.of(shelby.folder / "twin" / "dams")]


def test_a_city_that_could_be_taken_for_a_part_has_no_authority(tmp_path: Path) -> None:
    for name in ("twin.shelby", "broker", "Shelby", "", "shelby/x", "../shelby"):
        with pytest.raises(ScenarioError):
            Authority.create(tmp_path / "a", name)
    assert not (tmp_path / "a").exists()


def test_certificates_are_made_shown_and_revoked_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certs = str(tmp_path / "certs")

    def told(*arguments: str) -> tuple[int, str, str]:
        code = main(["certs", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    assert told("init", certs, "--city", "shelby")[0] == 0
    code, home, _ = told("issue", certs, "twin", "tower", "--days", "2")
    assert code == 0
    assert Trust.of(home.strip()).party == ("shelby", "twin", "tower")
    for file in (tmp_path / "certs" / "ca.key", Path(home.strip()) / "tls.key"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    told("issue", certs, "operator", "kim")
    assert [line.split()[0] for line in told("show", certs)[1].splitlines()] == ["valid"] * 2
    assert "spiffe://shelby/operator/kim" in told("revoke", certs, "operator", "kim")[1]
    assert [line.split()[0] for line in told("show", certs)[1].splitlines()] == ["revoked", "valid"]
    # what was revoked is known to those who were issued something, and says nothing of a new one
    assert len(Trust.of(home.strip()).material().revoked) == 1
    told("issue", certs, "operator", "kim")
    Trust.of(tmp_path / "certs" / "operator" / "kim").check_self()
    for wrong in (
        ("init", certs, "--city", "shelby"),
        ("issue", certs, "mayor", "kim"),
        ("issue", certs, "peer", "kim"),
        ("issue", certs, "twin", "../kim"),
        ("revoke", certs, "twin", "nobody"),
        ("show", str(tmp_path / "nowhere")),
    ):
        code, _, err = told(*wrong)
        assert code == 2, wrong
        assert err.startswith("multitwin: "), wrong
    with pytest.raises(SystemExit):
        main(["certs", "--help"])
    assert "spiffe://CITY/PART/NAME" in capsys.readouterr().out


def test_a_folder_that_is_none_is_said_to_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["why", "runs/x", "--tls", str(tmp_path)]) == 2
    assert "MISSING_FILE" in capsys.readouterr().err


def test_files_may_be_named_one_by_one_in_the_environment(
    shelby: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files.of(shelby.folder / "twin" / "dams")
    monkeypatch.setenv("MULTITWIN_TLS_CERT", str(files.certificate))
    monkeypatch.setenv("MULTITWIN_TLS_KEY", str(files.key))
    monkeypatch.setenv("MULTITWIN_TLS_CA", str(files.authority))
    on = footing.present()
    assert on.trust is not None
    assert on.trust.party.name == "dams"
    assert "MULTITWIN_TLS_KEY" not in footing.child_environment()
    with standing(Footing()):
        assert footing.present().trust is None
