"""Who calls: the owner of a token, whoever a client certificate names, or anybody at a loopback address."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import grpc

from lamella_engine.errors import StorageError
from lamella_engine.service.access import LOCAL, NOBODY, Principal
from lamella_engine.service.tokens import CERTIFICATE_NAMES, Tokens

Metadata = Iterable[tuple[str, str | bytes]]


class Callers:
    """Tells who calls. Safe for several threads.

    Parameters
    ----------
    tokens
        What tokens and certificates stand for.
    trusts_loopback
        Whether whoever shows neither is ``local``, an admin, and not nobody.
    certified
        Whether clients may show certificates.
    """

    def __init__(self, tokens: Tokens, *, trusts_loopback: bool, certified: bool) -> None:
        self._tokens = tokens
        self._trusts_loopback = trusts_loopback
        self._certified = certified

    def principal(self, context: grpc.ServicerContext) -> Principal:
        """Return who makes a call, as far as it is known; NOBODY for a credential that is not valid.

        A token goes before a certificate. Of several names in one certificate the first that a grant names counts, in
        the order of :data:`~lamella_engine.service.tokens.CERTIFICATE_NAMES`.
        """
        token = _token(context.invocation_metadata())
        if token is not None:
            return self._tokens.principal(token)
        if self._trusts_loopback:
            return LOCAL
        found = map(self._tokens.principal_of_certificate, _names(context.auth_context()))
        return next((principal for principal in found if principal is not NOBODY), NOBODY)

    def believed(self, metadata: Metadata) -> bool | None:
        """Whether a call with such metadata is of somebody, by what is known; None if nothing is. Waits for nothing."""
        token = _token(metadata)
        if token is not None:
            return self._tokens.believed(token)
        return self._trusts_loopback or self._certified

    def check(self, context: grpc.ServicerContext, principal: Principal) -> None:
        """Raise StorageError if the credential of a call means somebody else by now: streams outlive tokens.

        To call again may help: the client may have a new token, and is told if it has none.
        """
        if self.principal(context) != principal:
            raise StorageError("your token has ended, or changed: call again", kind="token_ended", transient=True)


def _token(metadata: Metadata) -> str | None:
    """Return the token of a call: an empty one for what can be none, None if there is no word of it."""
    given = [value for name, value in metadata if name == "authorization"]
    if not given:
        return None
    scheme, _, token = given[0].partition(" ") if isinstance(given[0], str) else ("", "", "")
    return token if scheme.lower() == "bearer" and len(given) == 1 else ""


def _names(identity: Mapping[str, Sequence[bytes]]) -> Iterator[str]:
    """Yield the names of a certificate, each with its kind; those that are no text name nobody."""
    for kind, field in CERTIFICATE_NAMES.items():
        for name in identity.get(field, ()):
            try:
                yield f"{kind}:{name.decode()}"
            except UnicodeDecodeError:
                continue
