"""``lamella serve`` and ``lamella token``: in processes of their own, as people and machines start them."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
from certificates import LOOPBACK, Authority
from service import Failure, WireClient, push_by_wire
from support import noise

from lamella.cli import run
from lamella.cli.schema import schema_of
from lamella_engine.rpc import lamella_pb2 as pb

PROGRAM = "import sys; from lamella.cli import main; sys.exit(main())"
INSECURE = ("--listen", "127.0.0.1:0", "--insecure-loopback")


class Served:
    """A service in a process of its own."""

    def __init__(self, root: Path, *arguments: str) -> None:
        command = [sys.executable, "-c", PROGRAM, "serve", "--root", str(root), *arguments, "--json"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LAMELLA_")}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self._lines: list[str] = []
        self._came = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self.process.stdout is not None
        said = ""
        while not said.endswith("}\n"):
            line = self.process.stdout.readline()
            assert line, self._lines
            said += line
        self.document = json.loads(said)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._came:
                self._lines.append(line)
                self._came.notify_all()

    def logged(self, count: int) -> list[dict[str, Any]]:
        """Wait for so many lines of the log; return all that there are."""
        with self._came:
            assert self._came.wait_for(lambda: len(self._lines) >= count, 60.0)
            return [json.loads(line) for line in self._lines]

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60.0)
        self._reader.join(60.0)
        return code


@contextmanager
def served(root: Path, *arguments: str) -> Iterator[Served]:
    found = Served(root, *arguments)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait(60.0)
        found._reader.join(60.0)
        for stream in (found.process.stdout, found.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: Any) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def answer(call) -> Callable[..., Any]:
    def answer(*arguments: Any) -> Any:
        code, out, err = call(*arguments, "--json")
        assert code == 0, err
        document = json.loads(out)
        jsonschema.Draft202012Validator(schema_of("token")).validate(document)
        return document

    return answer


# -- serve -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_says_where_it_is_logs_each_call_and_ends_well_at_a_signal(tmp_path: Path, number: int):
    with served(tmp_path, *INSECURE) as service:
        jsonschema.Draft202012Validator(schema_of("serve")).validate(service.document)
        with WireClient(service.document["address"]) as client:
            client.call("Repositories.Create", pb.CreateRequest(repository="team", max_depth=8))
            with pytest.raises(Failure):
                client.call("Versions.Models", pb.RepositoryRequest(repository="none"))
        first, second = service.logged(2)[:2]
        assert service.end(number) == 0
    assert (first["rpc"], first["principal"], first["repository"]) == ("Repositories.Create", "local", "team")
    assert (first["status"], first["kind"], first["level"]) == ("OK", "", "info")
    assert first["received_nbytes"] > 0
    assert first["sent_nbytes"] > 0
    assert 0 <= first["seconds"] < 60
    assert first["time"].endswith("+00:00")
    assert (second["status"], second["kind"]) == ("NOT_FOUND", "repository_not_found")


def test_a_service_ends_once_what_runs_is_done_and_followers_do_not_hold_it_up(tmp_path: Path):
    with served(tmp_path, *INSECURE) as service, WireClient(service.document["address"]) as client:
        client.call("Repositories.Create", pb.CreateRequest(repository="team", max_depth=8))
        push_by_wire(client, "team", "m@main", {"w": noise(1, 500)})
        watch = pb.WatchRequest(repository="team", model="m", ref="main").SerializeToString()
        following = client.channel.unary_stream("/lamella.v1.Versions/Watch")(watch, timeout=3600.0)
        assert pb.Version.FromString(next(following)).number == 1
        assert service.end() == 0
        assert list(following) == []
        assert following.code() is grpc.StatusCode.OK


def test_what_a_caller_says_is_one_line_of_the_log_and_a_token_in_it_is_none(tmp_path: Path):
    with served(tmp_path, *INSECURE) as service, WireClient(service.document["address"]) as client:
        secret = client.call("Access.CreateToken", pb.CreateTokenRequest(principal="ann", role="reader")).secret
        for name in (secret, "a\nb\x1b[2J", "x" * 100_000):
            with pytest.raises(Failure):
                client.call("Versions.Models", pb.RepositoryRequest(repository=name))
        with WireClient(service.document["address"], token=secret) as ann:
            assert ann.call("Access.WhoAmI", pb.Empty()).principal == "ann"
        lines = service.logged(5)
    assert [line["status"] for line in lines] == ["OK", "NOT_FOUND", "NOT_FOUND", "NOT_FOUND", "OK"]
    assert secret[4:-8] not in json.dumps(lines)
    assert lines[1]["repository"] == "lml_..."
    assert all(len(json.dumps(line)) < 8000 for line in lines)


def test_a_service_with_tls_takes_the_token_that_was_made_beside_it(tmp_path: Path, answer):
    authority = Authority()
    certificate, key = authority.issue("server", LOOPBACK).write(tmp_path, "server")
    root = tmp_path / "root"
    made = answer("token", "create", "--root", root, "--principal", "ann", "--role", "admin")
    tls = ("--listen", "127.0.0.1:0", "--tls-cert", str(certificate), "--tls-key", str(key))
    with served(root, *tls, "--reflection", "--traces") as service:
        credentials = grpc.ssl_channel_credentials(authority.certificate)
        with WireClient(service.document["address"], credentials=credentials, token=made["secret"]) as client:
            assert client.call("Access.WhoAmI", pb.Empty()).principal == "ann"
        assert service.end() == 0


def test_prometheus_is_told_of_calls_bytes_and_pushes_and_of_nobody_s_name(tmp_path: Path):
    with served(tmp_path, *INSECURE, "--metrics", "127.0.0.1:0") as service:
        with WireClient(service.document["address"]) as client:
            client.call("Repositories.Create", pb.CreateRequest(repository="team-x", max_depth=8))
            push_by_wire(client, "team-x", "m@main", {"w": noise(1, 5000)})
            with pytest.raises(Failure):
                client.call("Versions.Models", pb.RepositoryRequest(repository="none"))
        service.logged(6)
        with urllib.request.urlopen(f"http://{service.document['metrics']}/metrics", timeout=20.0) as reply:
            told = reply.read().decode()
        assert service.end() == 0
    assert 'lamella_calls_total{kind="",rpc="Pushes.Commit",status="OK"} 1.0' in told
    assert 'lamella_calls_total{kind="repository_not_found",rpc="Versions.Models",status="NOT_FOUND"} 1.0' in told
    assert 'lamella_call_seconds_count{rpc="Pushes.Begin"} 1.0' in told
    (received,) = (
        line for line in told.splitlines() if line.startswith('lamella_received_bytes_total{rpc="Pushes.Write"')
    )
    assert float(received.split()[-1]) > 20_000
    assert "lamella_pushes " in told
    assert "team-x" not in told
    assert "local" not in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--listen", "127.0.0.1:0"), "certificate"),
        (("--listen", "0.0.0.0:0", "--insecure-loopback"), "loopback"),
        (("--listen", "nowhere", "--insecure-loopback"), "HOST:PORT"),
        (("--listen", "127.0.0.1:0", "--tls-cert", "a.pem"), "--tls-key"),
        (("--listen", "127.0.0.1:0", "--insecure-loopback", "--client-ca", "a.pem"), "--tls-cert"),
        (("--listen", "127.0.0.1:0", "--tls-cert", "a.pem", "--tls-key", "b.pem"), "b.pem"),
        ((*INSECURE, "--metrics", "x"), "HOST:PORT"),
        ((*INSECURE, "--metrics", "256.0.0.1:0"), "256.0.0.1"),
    ],
)
def test_a_service_that_cannot_be_says_so_on_one_line(tmp_path: Path, call, arguments: tuple[str, ...], said: str):
    code, out, err = call("serve", "--root", tmp_path, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


@pytest.mark.parametrize(
    ("lacking", "arguments", "said"),
    [
        ("grpc", INSECURE, "lamella[service]"),
        ("grpc_health", INSECURE, "lamella[service]"),
        ("prometheus_client", (*INSECURE, "--metrics", "127.0.0.1:0"), "lamella[service]"),
        ("opentelemetry", (*INSECURE, "--traces"), "opentelemetry-api"),
        ("grpc_reflection", (*INSECURE, "--reflection"), "grpcio-reflection"),
    ],
)
def test_what_is_not_installed_is_said_without_a_traceback(tmp_path: Path, lacking: str, arguments: Any, said: str):
    without = f"import sys; sys.modules[{lacking!r}] = None\n{PROGRAM}"
    command = [sys.executable, "-c", without, "serve", "--root", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"pip install '{said}'" in done.stderr


def test_lamella_needs_no_grpc_unless_there_is_a_service():
    program = "import sys; sys.modules['grpc'] = sys.modules['google'] = None; import lamella, lamella.cli; "
    program += "lamella.init('memory://x').models()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60.0)


def test_a_call_is_a_span(tmp_path: Path):
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from lamella_engine.service.server import Answered
    from lamella_engine.service.traces import Traces

    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    traces = Traces(provider)
    traces.observe(
        Answered("Versions.Get", "ann", "team", "ipv4:1.2.3.4:5", "NOT_FOUND", "version_not_found", 0.5, 10, 20)
    )
    (span,) = spans.get_finished_spans()
    assert span.name == "lamella.v1.Versions/Get"
    assert span.end_time - span.start_time == 500_000_000
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.attributes["lamella.principal"] == "ann"
    assert span.attributes["rpc.grpc.status"] == "NOT_FOUND"


# -- token -------------------------------------------------------------------------------------------------------------


def test_a_token_is_made_listed_and_revoked_beside_the_service(tmp_path: Path, answer, call):
    made = answer(
        *("token", "create", "--root", tmp_path, "--principal", "ann", "--role", "writer"),
        *("--repository", "team/*", "--repository", "pool", "--ref", "bert@dev-*", "--ttl", "30d"),
    )
    grant = made["token"]
    assert made["secret"].startswith("lml_")
    assert (grant["repositories"], grant["refs"]) == (["team/*", "pool"], ["bert@dev-*"])
    assert answer("token", "list", "--root", tmp_path) == {"tokens": [grant]}
    assert answer("token", "revoke", grant["id"], "--root", tmp_path) == {"revoked": grant["id"]}
    assert answer("token", "list", "--root", tmp_path)["tokens"][0]["revoked"] is True
    code, out, _ = call("token", "list", "--root", tmp_path)
    assert code == 0
    assert "ann" in out
    assert "revoked" in out
    assert made["secret"][4:-8] not in out


def test_a_token_is_printed_alone(tmp_path: Path, call):
    code, out, _ = call("token", "create", "--root", tmp_path, "--principal", "ann", "--role", "reader")
    assert code == 0
    assert out.startswith("lml_")
    assert len(out) == 53


def push_small(client: WireClient, times: int) -> None:
    for number in range(times):
        push_by_wire(client, "team", "m@main", {"w": noise(number, 100)})


def test_a_service_has_the_quotas_that_it_is_given(tmp_path: Path):
    with (
        served(tmp_path, *INSECURE, "--max-uncommitted", "2KiB", "--max-daily", "4KiB") as service,
        WireClient(service.document["address"]) as client,
    ):
        client.call("Repositories.Create", pb.CreateRequest(repository="team", max_depth=8))
        with pytest.raises(Failure) as uncommitted:
            push_by_wire(client, "team", "m@main", {"w": noise(1, 600)})
        with pytest.raises(Failure) as daily:
            push_small(client, 6)
    assert (uncommitted.value.kind, uncommitted.value.error.context["limit_nbytes"]) == ("uncommitted_quota", 2 << 10)
    assert (daily.value.kind, daily.value.error.context["limit_nbytes"]) == ("daily_quota", 4 << 10)


@pytest.mark.parametrize("size", ["", "1", "GiB", "1GB", "-1GiB", "1.5GiB", "1 GiB", "0x1GiB"])
def test_a_size_without_a_unit_or_with_another_is_none(tmp_path: Path, call, size: str):
    assert call("serve", "--root", tmp_path, *INSECURE, f"--max-daily={size}")[0] == 2


def test_a_certificate_takes_the_place_of_a_secret(tmp_path: Path, answer, call):
    create = (
        "token",
        "create",
        "--root",
        tmp_path,
        "--principal",
        "ann",
        "--role",
        "reader",
        "--certificate",
        "dns:host-7",
    )
    made = answer(*create)
    assert made["secret"] is None
    assert call(*create)[0] == 4
    assert call(*create[:-1], "host-8")[0] == 2
    code, out, _ = call(*create[:-1], "dns:host-8")
    assert code == 0
    assert out.startswith("granted ")


def test_an_admin_manages_tokens_from_elsewhere(tmp_path: Path, answer, call):
    with served(tmp_path, *INSECURE) as service:
        url = f"grpc://{service.document['address']}/any"
        made = answer("-C", url, "token", "create", "--principal", "ann", "--role", "reader", "--ttl", "15m")
        assert answer("-C", url, "token", "list") == {"tokens": [made["token"]]}
        assert answer("token", "list", "--root", tmp_path) == {"tokens": [made["token"]]}
        assert answer("-C", url, "token", "revoke", made["token"]["id"]) == {"revoked": made["token"]["id"]}
        assert call("-C", url, "token", "revoke", "0" * 16)[0] == 3
        assert (
            "--root"
            in call("-C", url, "token", "create", "--principal", "a", "--role", "reader", "--certificate", "x")[2]
        )


@pytest.mark.parametrize(
    "arguments",
    [
        ("token", "create", "--root", "r", "--role", "reader"),
        ("token", "create", "--root", "r", "--principal", "ann"),
        ("token", "create", "--root", "r", "--principal", "ann", "--role", "god"),
        ("token", "create", "--root", "r", "--principal", "ann", "--role", "reader", "--ttl", "soon"),
        ("token", "create", "--root", "r", "--principal", "ann", "--role", "reader", "--ttl", "-1d"),
        ("token", "create", "--root", "r", "--principal", "ann", "--role", "reader", "--ttl", "99999999d"),
        ("token", "create", "abc", "--root", "r", "--principal", "ann", "--role", "reader"),
        ("token", "revoke", "--root", "r"),
        ("token", "renew", "--root", "r"),
        ("token", "list"),
    ],
)
def test_a_token_that_makes_no_sense_is_usage(tmp_path: Path, call, monkeypatch, arguments: tuple[str, ...]):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_memory_that_a_service_frees_is_there_when_it_wants_some_again():
    program = """
import resource
from lamella_engine.service.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [b"x" * (2 << 20) for _ in range(20)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(faults(), faults())
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    first, again = map(int, said.split())
    assert again < first // 100
