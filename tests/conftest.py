"""Hypothesis profiles: ``LAMELLA_HYPOTHESIS_PROFILE=dev|ci|nightly``; tests set no counts of their own. Object stores.

Of each server one runs in a process of pytest, from the first test that asks for it to the last.
"""

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import s3
from hypothesis import settings

if TYPE_CHECKING:
    import cluster

# Deadlines are off: the machines that run this are shared, and a slow example is not a wrong one.
settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=60, deadline=None, print_blob=True)
settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("LAMELLA_HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(autouse=True)
def _nothing_seen_before(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have each test remember heads of its own: places are used again, ports too."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / f"state-{next(_TESTS)}"))


_TESTS = count()


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[s3.Server]:
    with s3.seaweedfs() as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[s3.Server]:
    with s3.moto() as server:
        yield server


@pytest.fixture(scope="session")
def nodes(seaweedfs: s3.Server) -> Iterator["cluster.Nodes"]:
    """Return a Ray cluster of four nodes, whose workers know a bucket."""
    import cluster  # on use: Ray takes a second to import

    with cluster.running(4, seaweedfs.environment()) as found:
        yield found


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[s3.Server], None]:
    """Return what makes the environment that of a user of a server, with a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def use_server(server: s3.Server) -> None:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)

    return use_server


if os.environ.get("LAMELLA_CARRIER") == "remote":
    import remote

    # Each step of a state machine is a call or more over TLS; the machine itself is tried at length without a wire.
    settings.register_profile("carried", max_examples=10, deadline=None, print_blob=True)
    settings.load_profile("carried")

    @pytest.fixture(scope="session")
    def _service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[remote.Service]:
        with remote.secure_service(tmp_path_factory.mktemp("service")) as service:
            yield service

    @pytest.fixture(autouse=True)
    def _carrier(request: pytest.FixtureRequest, _service: remote.Service, monkeypatch: pytest.MonkeyPatch) -> None:
        _service.be_known(monkeypatch)
        monkeypatch.setenv("LAMELLA_CACHE_NBYTES", "0")  # tests count what is read, and do harm to what is stored
        remote.put_a_wire_between(request.module, _service.server, monkeypatch)

    def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
        carried = [item for item in items if remote.is_carried(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in carried])
        items[:] = carried
