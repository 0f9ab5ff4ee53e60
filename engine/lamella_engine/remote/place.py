"""Where a service is and what it is shown: URLs, and what the environment says of credentials.

``grpc://host:7443/team/models`` names a repository. It means TLS, except for a loopback host (``localhost``,
``127.0.0.1``, ``[::1]``), which is spoken to in the clear; ``grpcs://`` always means TLS. Secrets have no place in a
URL, which ends up in logs and shells' histories: they come from files and the environment.

* ``LAMELLA_TOKEN``, or the file that ``LAMELLA_TOKEN_FILE`` names, which is read for every call, so that a token may be
  renewed while a program runs.
* ``LAMELLA_CA``: a file of certificates to trust in place of the system's.
* ``LAMELLA_CLIENT_CERT`` and ``LAMELLA_CLIENT_KEY``: files with a certificate to show, and its key.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from lamella_engine.errors import InvalidInputError
from lamella_engine.hosts import is_loopback

DEFAULT_PORT = 7443

SCHEMES = ("grpc", "grpcs")


@dataclass(frozen=True, slots=True)
class Place:
    """A repository of a service."""

    host: str
    port: int
    repository: str
    secure: bool
    """Whether TLS is spoken."""

    @property
    def address(self) -> str:
        """``host:port``, as gRPC has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_url(url: str) -> Place:
    """Take a ``grpc://`` URL apart; raises InvalidInputError, whose message does not repeat what may be a secret."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _bad_url("its host or port makes no sense") from None
    if parts.username is not None or parts.password is not None:
        raise _bad_url("it has a name or password in it: set LAMELLA_TOKEN or LAMELLA_TOKEN_FILE instead")
    if parts.query or parts.fragment:
        raise _bad_url("it has a ? or # in it")
    repository = parts.path.strip("/")
    if not parts.hostname or not repository or port == 0:
        raise _bad_url("host or repository is missing")
    secure = parts.scheme == "grpcs" or not is_loopback(parts.hostname)
    return Place(parts.hostname, DEFAULT_PORT if port is None else port, repository, secure)


def _bad_url(cause: str) -> InvalidInputError:
    return InvalidInputError(f"this URL names no repository, {cause}: give grpc://host:port/name", kind="bad_url")


@dataclass(frozen=True)
class Credentials:
    """What a client is known by, and by what it knows the server."""

    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = field(default=None, repr=False)

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> "Credentials":
        """Return what the environment says; a variable that is empty says nothing. Raises InvalidInputError."""

        def path(name: str) -> Path | None:
            return Path(environment[name]) if environment.get(name) else None

        found = cls(
            token=environment.get("LAMELLA_TOKEN") or None,
            token_file=path("LAMELLA_TOKEN_FILE"),
            ca=path("LAMELLA_CA"),
            certificate=path("LAMELLA_CLIENT_CERT"),
            key=path("LAMELLA_CLIENT_KEY"),
        )
        if (found.certificate is None) != (found.key is None):
            raise InvalidInputError(
                "a certificate is shown with its key: set both LAMELLA_CLIENT_CERT and LAMELLA_CLIENT_KEY",
                kind="bad_credential",
            )
        return found

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what each call carries; raises InvalidInputError."""
        token = self.token
        if token is None and self.token_file is not None:
            token = read(self.token_file, "LAMELLA_TOKEN_FILE").decode("ascii", "replace")
        if token is None:
            return ()
        token = token.strip()
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise InvalidInputError("the token is no token: one is letters and digits", kind="bad_credential")
        return (("authorization", f"Bearer {token}"),)


def read(path: Path, variable: str) -> bytes:
    """Return the bytes of a file that a variable of the environment names; raises InvalidInputError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInputError(
            f"cannot read {path}, which {variable} names: {error.strerror}", kind="bad_credential"
        ) from None
