"""Tokens: made once, shown once, kept as a keyed hash, and ended by a second object beside theirs.

A token is ``lml_``, 40 hex digits drawn at random, and 8 that check them for typing errors. What is kept under
``access/`` at the root of a service is a JSON document named by the hash's first 8 bytes.
"""

import hmac
import json
import logging
import re
import secrets
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import MappingProxyType

from blake3 import blake3

from lamella_engine.errors import AlreadyExistsError, CorruptionError, InvalidInputError, NotFoundError
from lamella_engine.objects import Objects
from lamella_engine.service.access import NOBODY, Principal, check_role

logger = logging.getLogger("lamella.service")

PREFIX = "lml_"
_SECRET_BYTES = 20
_LENGTH = len(PREFIX) + 2 * _SECRET_BYTES + 8

LONGEST_TTL_S = 100 * 365 * 86_400

CERTIFICATE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "uri": "peer_uri",
        "dns": "peer_dns",
        "email": "peer_email",
        "ip": "peer_ip",
        "cn": "x509_common_name",
    }
)
"""Kinds of names in client certificates, and where gRPC has them: four of alternative names, and the common name.

A grant is for ``dns:host.example.org``, not for that name of whatever kind: authorities check one kind as they do not
check another, so whoever may have ``host.example.org`` for a common name must not pass for the host."""

FRESH_S = 30.0
"""How long what is known of a token is believed: so long, at most, does one that was revoked live on."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token stands for."""

    id: str
    """16 hex digits."""
    principal: str
    role: str
    repositories: tuple[str, ...]
    refs: tuple[str, ...]
    expires: int
    """Seconds since 1970; 0 for never."""
    revoked: bool = False

    @property
    def valid(self) -> bool:
        """Whether it may be used now."""
        return not self.revoked and (not self.expires or time.time() < self.expires)


_SEAL_NBYTES = 32


class Tokens:
    """The tokens of one service. Safe for several threads, and for several servers on one root."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._key = _key_of(objects)
        self._known: dict[str, tuple[float, Grant | None, bytes]] = {}
        self._lock = threading.Lock()

    def create(
        self,
        principal: str,
        role: str,
        *,
        repositories: Sequence[str] = ("*",),
        refs: Sequence[str] = ("*",),
        ttl_s: int = 0,
        certificate: str = "",
    ) -> tuple[str, Grant]:
        """Make a token; return it, and what it stands for. It cannot be had again.

        With ``certificate``, a name in client certificates with its kind before it (:data:`CERTIFICATE_NAMES`), such as
        ``dns:host.example.org``, those take the place of the token, and nothing is to be kept secret.

        Raises InvalidInputError for a role that there is not, or a name that is none; AlreadyExistsError for a
        certificate that stands for somebody already, or did.
        """
        if not principal or len(principal) > 255 or not principal.isprintable():
            raise InvalidInputError("a principal is 1 to 255 printable characters", kind="bad_principal")
        if not 0 <= ttl_s <= LONGEST_TTL_S or not all((*repositories, *refs)):
            raise InvalidInputError("a lifetime is 0 seconds to 100 years, and a glob not empty", kind="bad_grant")
        if certificate:
            _check_certificate_name(certificate)
        body = PREFIX + secrets.token_hex(_SECRET_BYTES)
        token = _of_certificate(certificate) if certificate else f"{body}{zlib.crc32(body.encode()):08x}"
        hashed = self._hash(token)
        expires = int(time.time()) + ttl_s if ttl_s else 0
        id = hashed[:8].hex()
        grant = Grant(id, principal, check_role(role), tuple(repositories or ("*",)), tuple(refs or ("*",)), expires)
        document = asdict(grant) | {"hash": hashed.hex()}
        del document["revoked"]
        self._objects.put_if_absent(_grant_name(id), [json.dumps(document).encode()])
        self._forget(id)  # somebody may have come with this certificate before
        return "" if certificate else token, grant

    def principal(self, token: str) -> Principal:
        """Return whom a token stands for; NOBODY for one that is none, or is not valid any more."""
        return self._granted(token) if _is_whole(token) else NOBODY

    def believed(self, token: str) -> bool | None:
        """Whether a token was valid when it was looked up last; None for one that was not, or not of late.

        Looks nothing up: good for a guess, not for a decision.
        """
        if not _is_whole(token):
            return False
        hashed = self._hash(token)
        id = hashed[:8].hex()
        with self._lock:
            known = self._known.get(id)
        if known is None:
            return None
        if _principal(hashed, *known[1:]) is not NOBODY:
            return True
        return None if self._fresh(id) is None else False

    def principal_of_certificate(self, name: str) -> Principal:
        """Return whom a name in a client's certificate, with its kind, stands for; NOBODY if no grant is for it."""
        return self._granted(_of_certificate(name))

    def _granted(self, token: str) -> Principal:
        hashed = self._hash(token)
        return _principal(hashed, *self._look_up(hashed[:8].hex()))

    def list(self) -> "list[Grant]":
        """Return all tokens, ended ones too, but for those that are damaged: of these a warning tells."""
        found = []
        for info in self._objects.list(_grant_name("")):
            try:
                grant, _ = self._read(info.name.removeprefix(_grant_name("")))
            except CorruptionError as error:
                logger.warning("%s", error)
            else:
                found += [grant] if grant is not None else []
        return found

    def revoke(self, id: str) -> None:
        """End a token, even a damaged one. Idempotent; raises NotFoundError if there is none."""
        if not (re.fullmatch("[0-9a-f]{16}", id) and self._has(_grant_name(id))):
            raise NotFoundError(f"there is no token {id}: see the list", kind="token_not_found", token=id)
        with suppress(AlreadyExistsError):
            self._objects.put_if_absent(f"access/revoked-{id}", [b""])
        self._forget(id)

    def sealed(self, repository: str, data: bytes) -> bytes:
        """Return bytes that a client is to give back, at whichever server of this root, for a repository by its id."""
        return self._seal(repository, data) + data

    def unsealed(self, repository: str, sealed: bytes) -> bytes:
        """Return the data of :meth:`sealed`; raises InvalidInputError if it was not made here, for this repository."""
        seal, data = sealed[:_SEAL_NBYTES], sealed[_SEAL_NBYTES:]
        if not hmac.compare_digest(seal, self._seal(repository, data)):
            raise InvalidInputError("this is no part of a push to this repository", kind="bad_part")
        return data

    def _seal(self, repository: str, data: bytes) -> bytes:
        # No token begins so: a seal is never the hash of one.
        return blake3(f"part {repository}\0".encode() + data, key=self._key).digest(_SEAL_NBYTES)

    def _forget(self, id: str) -> None:
        with self._lock:
            self._known.pop(id, None)

    def _hash(self, token: str) -> bytes:
        return blake3(token.encode(), key=self._key).digest()

    def _fresh(self, id: str) -> tuple[Grant | None, bytes] | None:
        with self._lock:
            known = self._known.get(id)
        return known[1:] if known is not None and time.monotonic() - known[0] < FRESH_S else None

    def _look_up(self, id: str) -> tuple[Grant | None, bytes]:
        if (known := self._fresh(id)) is not None:
            return known
        now = time.monotonic()
        grant, hashed = self._read(id)
        with self._lock:
            if len(self._known) > 10_000:  # of tokens that nobody gave
                self._known = {name: known for name, known in self._known.items() if known[1] is not None}
            self._known[id] = now, grant, hashed
        return grant, hashed

    def _read(self, id: str) -> tuple[Grant | None, bytes]:
        try:
            data = self._objects.get(_grant_name(id))
        except NotFoundError:
            return None, b""
        try:
            document = json.loads(data)
            hashed = bytes.fromhex(document.pop("hash"))
            document |= {key: tuple(document[key]) for key in ("repositories", "refs")}
            grant = Grant(**document, revoked=self._has(f"access/revoked-{id}"))
        except (ValueError, KeyError, TypeError):
            raise CorruptionError(f"the token {id} is damaged: revoke it", kind="bad_token", token=id) from None
        return grant, hashed

    def _has(self, name: str) -> bool:
        try:
            self._objects.size(name)
        except NotFoundError:
            return False
        return True


def _is_whole(token: str) -> bool:
    """Whether a token is one without typing errors."""
    if not (len(token) == _LENGTH and token.startswith(PREFIX) and token.isascii()):
        return False
    return f"{zlib.crc32(token[:-8].encode()):08x}" == token[-8:]


def _principal(hashed: bytes, grant: Grant | None, expected: bytes) -> Principal:
    """Return whom a token of a hash stands for, given what is stored under its id, and the hash there."""
    if grant is None or not hmac.compare_digest(hashed, expected) or not grant.valid:
        return NOBODY
    return Principal(grant.principal, grant.role, grant.repositories, grant.refs)


def _check_certificate_name(text: str) -> None:
    kind, _, name = text.partition(":")
    if kind not in CERTIFICATE_NAMES or not name or not name.isprintable():
        raise InvalidInputError(
            f"{text!r} names no certificate: write the kind of the name before it, such as dns:host.example.org; there "
            f"are {', '.join(CERTIFICATE_NAMES)}",
            kind="bad_certificate_name",
        )


def _of_certificate(name: str) -> str:
    """Return what stands for a certificate where tokens are hashed: no token begins so."""
    return f"certificate {name}"


def _grant_name(id: str) -> str:
    return f"access/grant-{id}"


def _key_of(objects: Objects) -> bytes:
    """Return the key that hashes are made with, drawn when it is first needed."""
    with suppress(AlreadyExistsError):
        try:
            return _checked_key(objects.get("access/key"))
        except NotFoundError:
            objects.put_if_absent("access/key", [secrets.token_bytes(32)])
    return _checked_key(objects.get("access/key"))


def _checked_key(key: bytes) -> bytes:
    if len(key) != 32:
        raise CorruptionError("the key of the tokens is damaged: restore access/key from a copy", kind="bad_key")
    return key
