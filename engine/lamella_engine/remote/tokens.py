"""Tokens of a service, for its admins."""

from collections.abc import Sequence

from lamella_engine.errors import InvalidInputError
from lamella_engine.remote.channel import Channel
from lamella_engine.remote.place import Credentials, parse_url
from lamella_engine.rpc import lamella_pb2 as pb


class RemoteTokens:
    """Makes, lists and revokes tokens as the service's own ``Tokens`` does; a context manager.

    Parameters
    ----------
    url
        Of the service, with any name of a repository; the credential is that of the environment.
    """

    def __init__(self, url: str) -> None:
        self._channel = Channel(parse_url(url), Credentials.of())

    def __enter__(self) -> "RemoteTokens":
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    def create(
        self,
        principal: str,
        role: str,
        *,
        repositories: Sequence[str],
        refs: Sequence[str],
        ttl_s: int = 0,
        certificate: str = "",
    ) -> tuple[str, pb.Token]:
        """Make a token; return it, and what it stands for. Tried once: a lost answer would leave one of nobody's.

        Raises InvalidInputError for a certificate, which is granted on the service's machine.
        """
        if certificate:
            raise InvalidInputError("a certificate is granted on the service's machine: give --root", kind="usage")
        request = pb.CreateTokenRequest(
            principal=principal, role=role, repositories=repositories, refs=refs, ttl_s=ttl_s
        )
        reply = self._channel.call_once("Access.CreateToken", request)
        return reply.secret, reply.token

    def list(self) -> "list[pb.Token]":
        """Return all tokens, ended ones too."""
        return [*self._channel.call("Access.ListTokens", pb.Empty()).tokens]

    def revoke(self, id: str) -> None:
        """End a token; raises NotFoundError."""
        self._channel.call("Access.RevokeToken", pb.RevokeTokenRequest(id=id))
