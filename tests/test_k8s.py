"""The Kubernetes base renders, is valid, and runs the commands that the demo runs."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from federation.__main__ import parser
from federation.scenario.run import twin_class

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def resources() -> list[dict[str, Any]]:
    rendered = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "k8s" / "base")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert rendered.returncode == 0, rendered.stderr
    return list(yaml.safe_load_all(rendered.stdout))


def pods(resources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [r["spec"]["template"]["spec"] for r in resources if r["kind"] == "Deployment"]
    for ray in (r["spec"] for r in resources if r["kind"] == "RayCluster"):
        groups = [ray["headGroupSpec"], *ray["workerGroupSpecs"]]
        found += [group["template"]["spec"] for group in groups]
    return found


def test_every_resource_is_valid(resources: list[dict[str, Any]]) -> None:
    plain = [r for r in resources if not r["apiVersion"].startswith("ray.io")]
    assert len(plain) >= 10
    for resource in plain:
        kubernetes_validate.validate(resource, "1.31", strict=True)
    assert [r["kind"] for r in resources if r not in plain] == ["RayCluster"]


def test_every_pod_meets_the_restricted_standard(resources: list[dict[str, Any]]) -> None:
    """The rules of the Pod Security Standards, level restricted, as the namespace enforces."""
    (namespace,) = (r for r in resources if r["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert len(pods(resources)) == 7
    for pod in pods(resources):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert {next(iter(set(v) - {"name"})) for v in pod["volumes"]} <= {
            "emptyDir",
            "persistentVolumeClaim",
            "secret",
        }
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert container["resources"]["limits"]["memory"]


def test_the_broker_and_the_four_twins_are_probed_by_grpc_health(
    resources: list[dict[str, Any]],
) -> None:
    deployments = {r["metadata"]["name"]: r for r in resources if r["kind"] == "Deployment"}
    assert set(deployments) == {"broker", "disaster", "energy", "city", "medical"}
    for deployment in deployments.values():
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        (port,) = (p["containerPort"] for p in container["ports"] if p["name"] == "health")
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"]["port"] == port


def test_every_container_runs_a_command_that_exists(resources: list[dict[str, Any]]) -> None:
    for resource in resources:
        if resource["kind"] != "Deployment":
            continue
        (container,) = resource["spec"]["template"]["spec"]["containers"]
        options = parser().parse_args(container["args"])
        if options.command == "serve":
            assert twin_class(options.twin).__name__.lower().startswith(options.name)
    text = (ROOT / "k8s" / "Containerfile").read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if line.startswith("CMD"))
    words = yaml.safe_load(command.removeprefix("CMD"))
    assert parser().parse_args(shlex.split(" ".join(words))).command == "broker"
