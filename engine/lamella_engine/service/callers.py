"""Who calls: the owner of a token, whoever a client certificate names, or anybody at a loopback address."""

from collections.abc import Iterator, Mapping, Sequence

import grpc

from lamella_engine.errors import StorageError
from lamella_engine.service.access import LOCAL, NOBODY, Principal
from lamella_engine.service.tokens import CERTIFICATE_NAMES, Tokens


class Callers:
    """Tells who calls. Safe for several threads.

    Parameters
    ----------
    tokens
        What tokens and certificates stand for.
    trusts_loopback
        Whether whoever shows neither is ``local``, an admin, and not nobody.
    """

    def __init__(self, tokens: Tokens, *, trusts_loopback: bool) -> None:
        self._tokens = tokens
        self._trusts_loopback = trusts_loopback

    def principal(self, context: grpc.ServicerContext) -> Principal:
        """Return who makes a call, as far as it is known; NOBODY for a credential that is not valid.

        A token goes before a certificate. Of several names in one certificate the first that a grant names counts, in
        the order of :data:`~lamella_engine.service.tokens.CERTIFICATE_NAMES`.
        """
        given = [value for name, value in context.invocation_metadata() if name == "authorization"]
        if given:
            scheme, _, token = given[0].partition(" ") if isinstance(given[0], str) else ("", "", "")
            return self._tokens.principal(token) if scheme.lower() == "bearer" and len(given) == 1 else NOBODY
        if self._trusts_loopback:
            return LOCAL
        found = map(self._tokens.principal_of_certificate, _names(context.auth_context()))
        return next((principal for principal in found if principal is not NOBODY), NOBODY)

    def check(self, context: grpc.ServicerContext, principal: Principal) -> None:
        """Raise StorageError if the credential of a call means somebody else by now: streams outlive tokens.

        To call again may help: the client may have a new token, and is told if it has none.
        """
        if self.principal(context) != principal:
            raise StorageError("your token has ended, or changed: call again", kind="token_ended", transient=True)


def _names(identity: Mapping[str, Sequence[bytes]]) -> Iterator[str]:
    """Yield the names of a certificate, each with its kind; those that are no text name nobody."""
    for kind, field in CERTIFICATE_NAMES.items():
        for name in identity.get(field, ()):
            try:
                yield f"{kind}:{name.decode()}"
            except UnicodeDecodeError:
                continue
