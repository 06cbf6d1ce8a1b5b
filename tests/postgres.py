"""A PostgreSQL server of the tests' own: it begins and ends with them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

USER = "multitwin"
BOUND_S = 60.0


class Server:
    """It listens at a unix socket in its folder, and takes nobody without a password."""

    def __init__(self, folder: Path) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
        if not found:
            raise FileNotFoundError("no PostgreSQL server here: make system")
        self._bin = found[-1]
        self._folder = folder
        self.password = secrets.token_hex(16)
        self._process: subprocess.Popen[str] | None = None
        # a server doesn't run as root, and ends with whoever has begun it
        self._prefix = ["setpriv", "--pdeathsig", "INT"]
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
            self._prefix += ["--reuid", "postgres", "--regid", "postgres", "--init-groups"]
        secret = folder / "password"
        secret.write_text(self.password)
        secret.chmod(0o644)
        subprocess.run(
            [
                *(*self._prefix, str(self._bin / "initdb"), "-D", str(folder / "data")),
                *("-U", USER, "-A", "scram-sha-256", f"--pwfile={secret}"),
                *("-E", "UTF8", "--locale=C", "--no-sync"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=BOUND_S,
            cwd=folder,
        )

    def start(self) -> None:
        ready = threading.Event()
        self._process = process = subprocess.Popen(
            [
                *(*self._prefix, str(self._bin / "postgres"), "-D", str(self._folder / "data")),
                *("-k", str(self._folder), "-c", "listen_addresses=", "-c", "fsync=off"),
            ],
            stderr=subprocess.PIPE,
            text=True,
            cwd=self._folder,
        )

        def listen() -> None:
            assert process.stderr is not None
            with process.stderr:
                for line in process.stderr:
                    if "ready to accept connections" in line:
                        ready.set()

        threading.Thread(target=listen, daemon=True).start()
        assert ready.wait(BOUND_S), "PostgreSQL doesn't start"

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends it in order, SIGQUIT as if it had fallen."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(BOUND_S)
            self._process = None

    def url(self, database: str) -> str:
        return f"postgresql://{USER}:{self.password}@/{database}?host={self._folder}"

    def sql(self, database: str, statement: str) -> list[tuple[object, ...]]:
        """Somebody else does something in a database."""
        with psycopg.connect(self.url(database), autocommit=True) as db:
            found = db.execute(statement.encode())
            return found.fetchall() if found.description else []

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"t{secrets.token_hex(8)}"
        self.sql("postgres", f"CREATE DATABASE {name}")
        return self.url(name)


@contextmanager
def server() -> Iterator[Server]:
    # a folder of the test run is closed to the user that the server runs as
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        running = Server(folder)
        running.start()
        try:
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(folder)
