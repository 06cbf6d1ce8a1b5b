"""Says whether federation/v1 is what the protos generate: `python -m tests.generated`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = Path("federation/v1")


def differences() -> list[str]:
    """The files of federation/v1 that are missing, extra, or not as generated."""
    protos = sorted(str(p.relative_to(ROOT / "protos")) for p in ROOT.glob("protos/**/*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        outputs = ("python", "grpc_python", "mypy", "mypy_grpc")
        subprocess.run(
            [
                sys.executable,
                "-m",
                "grpc_tools.protoc",
                "-I",
                str(ROOT / "protos"),
                *(f"--{output}_out={folder}" for output in outputs),
                *protos,
            ],
            check=True,
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            # protoc finds its mypy plugins on the path
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        fresh = {p.name: p.read_bytes() for p in (Path(folder) / PACKAGE).iterdir()}
    kept = {
        p.name: p.read_bytes()
        for p in (ROOT / PACKAGE).iterdir()
        if p.suffix in {".py", ".pyi"} and p.name != "__init__.py"
    }
    return sorted(n for n in {*fresh, *kept} if fresh.get(n) != kept.get(n))


if __name__ == "__main__":
    wrong = differences()
    for name in wrong:
        print(f"{PACKAGE / name} is not what the protos generate; run: make proto")
    sys.exit(bool(wrong))
