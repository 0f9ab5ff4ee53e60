"""What is written for systemd, Docker and Kubernetes is what they can read, and what ``lamella serve`` takes."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from lamella.cli.app import app
from lamella_engine.service.server import Server

DEPLOY = Path(__file__).parents[1] / "deploy"
UNIT = DEPLOY / "lamella.service"
DOCKERFILE = DEPLOY / "Dockerfile"
KUBERNETES = DEPLOY / "kubernetes.yaml"
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def settings(section: str) -> Iterator[tuple[str, str]]:
    """Yield the settings of a section of the unit; the same one may come more than once."""
    text = UNIT.read_text().replace("\\\n", " ")
    (body,) = re.findall(rf"^\[{section}\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    for line in body.splitlines():
        if line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            assert equals, line
            yield name, value


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(name, rest) for name, rest in (line.split(maxsplit=1) for line in text.splitlines() if line)]


def documents() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(KUBERNETES.read_text())}


def container() -> dict[str, Any]:
    (found,) = documents()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


def unit_command() -> list[str]:
    return shlex.split(dict(settings("Service"))["ExecStart"])[1:]


def docker_command() -> list[str]:
    return yaml.safe_load(dict(instructions())["CMD"])


@pytest.mark.parametrize(
    "arguments", [unit_command(), docker_command(), container()["args"]], ids=["systemd", "docker", "kubernetes"]
)
def test_the_command_line_is_one_that_lamella_understands_with_tls_and_metrics(arguments: list[str]):
    verb, *options = arguments
    assert verb == "serve"
    command = typer.main.get_command(app)
    with command.make_context("lamella", []) as root:  # parsed, and not run
        context = command.commands[verb].make_context(verb, list(options), parent=root)
    assert context.params["listen"].endswith(":7443")
    assert context.params["tls_cert"] is not None
    assert context.params["tls_key"] is not None
    assert context.params["metrics"].endswith(":9464")
    assert not context.params["insecure_loopback"]


def test_memory_goes_back_to_the_system_wherever_it_runs():
    environment = [value for name, value in settings("Service") if name == "Environment"]
    assert {f"{name}={value}" for name, value in MALLOC.items()} <= set(environment)
    declared = dict(instructions())["ENV"].split()
    assert {f"{name}={value}" for name, value in MALLOC.items()} <= set(declared)
    assert MALLOC.items() <= {item["name"]: item["value"] for item in container()["env"]}.items()


def test_the_unit_is_one_and_keeps_the_service_from_everything_else(tmp_path: Path):
    if (tool := shutil.which("systemd-analyze")) is not None:
        unit = tmp_path / "lamella.service"
        unit.write_text(UNIT.read_text().replace("/opt/lamella/bin/lamella", "/bin/true"))
        done = subprocess.run(
            [tool, "verify", "--man=no", unit], capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
    service = dict(settings("Service"))
    assert service["User"] == "lamella"
    assert service["ProtectSystem"] == "strict"
    assert service["NoNewPrivileges"] == "yes"
    assert service["CapabilityBoundingSet"] == ""
    assert [name for name, _ in settings("Install")] == ["WantedBy"]
    assert {"Description", "After"} <= {name for name, _ in settings("Unit")}


def test_no_setting_of_the_unit_is_given_twice_but_those_that_add_up():
    names = [name for section in ("Unit", "Service", "Install") for name, _ in settings(section)]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == {"Environment", "LoadCredential", "SystemCallFilter"}


def test_the_dockerfile_has_no_fault_that_a_linter_finds():
    tool = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert tool is not None
    done = subprocess.run([tool, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_runs_as_nobody_in_particular_and_what_it_copies_is_there():
    found = instructions()
    assert dict(found)["USER"] == "10001:10001"
    assert dict(found)["STOPSIGNAL"] == "SIGTERM"
    names = [name for name, _ in found]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert "constraints.txt" in dict(found[: names.index("FROM", 1)])["RUN"]


def test_the_manifest_is_what_kubernetes_takes():
    assert set(documents()) == {"Deployment", "Service"}
    for document in documents().values():
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_parts_of_the_manifest_fit_together():
    pod = documents()["Deployment"]["spec"]["template"]
    service = documents()["Service"]["spec"]
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    assert documents()["Deployment"]["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert {port["targetPort"] for port in service["ports"]} <= set(ports)
    assert ports == {"grpc": 7443, "metrics": 9464}
    assert {mount["name"] for mount in container()["volumeMounts"]} == {
        volume["name"] for volume in pod["spec"]["volumes"]
    }
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert container()["securityContext"]["readOnlyRootFilesystem"] is True
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container())


def test_a_server_that_is_asked_to_end_has_more_time_than_it_takes():
    grace_s = signature(Server.stop).parameters["grace_s"].default
    pod = documents()["Deployment"]["spec"]["template"]["spec"]
    assert grace_s < int(dict(settings("Service"))["TimeoutStopSec"])
    assert grace_s < pod["terminationGracePeriodSeconds"]
