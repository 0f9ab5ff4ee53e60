"""Who may do what: default deny, one function that decides, one table that says what each rpc needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from types import MappingProxyType

from lamella_engine.errors import InvalidInputError, PermissionDeniedError, RepositoryNotFoundError


class Verb(Enum):
    """What an rpc does."""

    IDENTIFY = "ask who one is"
    OPEN = "open"
    READ = "read"
    PUSH = "push"
    SET_REFS = "set refs"
    INSPECT = "verify"
    AUDIT = "audit"
    CREATE = "create repositories"
    GRANT = "manage access"


_ANYBODY = (Verb.IDENTIFY, Verb.OPEN)
"""What everybody may do who is somebody."""

ROLES: Mapping[str, frozenset[Verb]] = MappingProxyType(
    {
        "reader": frozenset({*_ANYBODY, Verb.READ}),
        "writer": frozenset({*_ANYBODY, Verb.READ, Verb.PUSH}),
        "maintainer": frozenset({*_ANYBODY, Verb.READ, Verb.PUSH, Verb.SET_REFS, Verb.INSPECT}),
        "gc-operator": frozenset({*_ANYBODY, Verb.READ, Verb.INSPECT}),
        "auditor": frozenset({*_ANYBODY, Verb.INSPECT, Verb.AUDIT}),
        "admin": frozenset(Verb),
    }
)
"""Role -> what it may do, in the repositories and at the refs that a grant names."""

POLICY: Mapping[str, Verb] = MappingProxyType(
    {
        "Repositories.Create": Verb.CREATE,
        "Repositories.Describe": Verb.OPEN,
        "Repositories.Stats": Verb.READ,
        "Versions.Resolve": Verb.READ,
        "Versions.Get": Verb.READ,
        "Versions.Ancestors": Verb.READ,
        "Versions.Models": Verb.READ,
        "Versions.Refs": Verb.READ,
        "Versions.UpdateRefs": Verb.SET_REFS,
        "Versions.Watch": Verb.READ,
        "Versions.Locate": Verb.READ,
        "Versions.Read": Verb.READ,
        "Pushes.Begin": Verb.PUSH,
        "Pushes.Consider": Verb.PUSH,
        "Pushes.Plan": Verb.PUSH,
        "Pushes.Write": Verb.PUSH,
        "Pushes.Grant": Verb.PUSH,
        "Pushes.Commit": Verb.PUSH,
        "Pushes.Part": Verb.PUSH,
        "Pushes.Join": Verb.PUSH,
        "Pushes.Outcome": Verb.PUSH,
        "Pushes.Abandon": Verb.PUSH,
        "Jobs.Diff": Verb.READ,
        "Jobs.Distance": Verb.READ,
        "Jobs.Verify": Verb.INSPECT,
        "Jobs.Audit": Verb.AUDIT,
        "Access.CreateToken": Verb.GRANT,
        "Access.ListTokens": Verb.GRANT,
        "Access.RevokeToken": Verb.GRANT,
        "Access.WhoAmI": Verb.IDENTIFY,
    }
)
"""Every rpc, and what it takes to be allowed to call it. A server does not start with one that is not here."""


AUDITED = frozenset(
    {
        "Versions.Read",
        "Versions.UpdateRefs",
        "Pushes.Commit",
        "Jobs.Diff",
        "Jobs.Distance",
        "Jobs.Verify",
        "Jobs.Audit",
    }
)
"""Rpcs that are noted where reads are: those that give away what is stored, and those that change it, for the log knows
who did that, but not from where."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody who calls, as far as it is known."""

    name: str
    role: str
    repositories: tuple[str, ...] = ("*",)
    """Globs over names of repositories."""
    refs: tuple[str, ...] = ("*",)
    """Globs over ``model@ref``: where pushes may go and refs be set. Reading knows no such bounds."""


NOBODY = Principal("", "nobody", (), ())
"""Who gives no credential."""

LOCAL = Principal("local", "admin")
"""Whoever calls on a loopback address of a server that was told to trust it."""


@dataclass(frozen=True, slots=True)
class Resource:
    """What an rpc is about."""

    repository: str | None = None
    """None for the server itself."""
    refs: tuple[str, ...] = ()
    """Each as ``model@ref``."""


def identified(principal: Principal) -> Principal:
    """Return a principal who is somebody; raises PermissionDeniedError for NOBODY, whatever the call is about."""
    if principal is NOBODY:
        raise PermissionDeniedError("not allowed: give a token that is valid", kind="not_allowed")
    return principal


def authorize(principal: Principal, verb: Verb, resource: Resource) -> None:
    """Return if ``principal`` may do ``verb`` to ``resource``.

    Raises
    ------
    RepositoryNotFoundError
        The repository may not even be known to exist: what is said of one that does not.
    PermissionDeniedError
        Anything else that is not allowed.
    """
    allowed = ROLES.get(principal.role, frozenset())
    if resource.repository is not None:
        here = any(fnmatchcase(resource.repository, glob) for glob in principal.repositories)
        if not here or Verb.OPEN not in allowed:
            raise repository_not_found(resource.repository)
    if verb not in allowed:
        raise PermissionDeniedError(f"not allowed: a {principal.role} may not {verb.value}", kind="not_allowed")
    if verb is Verb.GRANT and not ("*" in principal.repositories and "*" in principal.refs):
        raise PermissionDeniedError(  # or an admin of one repository could make a token for all
            "not allowed: whoever manages access has to be an admin of every repository and ref", kind="not_allowed"
        )
    for ref in resource.refs:
        if not any(fnmatchcase(ref, glob) for glob in principal.refs):
            raise PermissionDeniedError(f"not allowed: you may not move {ref}", kind="not_allowed", ref=ref)


def repository_not_found(name: str) -> RepositoryNotFoundError:
    """Make the error for a repository that is not there, or that the caller may not know of."""
    return RepositoryNotFoundError(
        f"there is no repository {name!r} that you may read: check the name and your token", repository=name
    )


def check_role(role: str) -> str:
    """Return ``role`` if it is one; raises InvalidInputError."""
    if role not in ROLES:
        raise InvalidInputError(f"{role!r} is no role: choose one of {', '.join(ROLES)}", kind="bad_role")
    return role
