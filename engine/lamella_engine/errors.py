"""What can go wrong, arranged by what the catcher would do about it.

    LamellaError
    ├── InvalidInputError      2  mend the call (also a ValueError)
    ├── NotFoundError          3  name something that exists (also a KeyError)
    │   ├── RepositoryNotFoundError
    │   ├── RefNotFoundError
    │   ├── VersionNotFoundError
    │   └── TensorNotFoundError
    ├── AlreadyExistsError     4  choose another name
    ├── ConflictError          4  the branch moved: look at it, then push again
    ├── PermissionDeniedError  5  ask for the right
    ├── CorruptionError        6  stop; stored bytes are not what was written
    ├── UnsupportedFormatError 6  upgrade lamella
    ├── StorageError           7  try again if ``transient``
    ├── OutcomeUnknownError    8  ask with the same push id before doing anything else
    └── LimitError             9  ask for less, or raise the limit

The number is the exit code of the command line; ``BUG`` (70) stands for every exception that is not in this tree.
"""

from typing import Any, ClassVar

BUG_EXIT_CODE = 70
"""Exit code for an exception outside this tree (sysexits.h, EX_SOFTWARE)."""


class LamellaError(Exception):
    """Base of every error that lamella raises on purpose.

    Parameters
    ----------
    message
        One line: the cause, then the next step.
    kind
        Stable, machine-readable name of the precise cause, such as ``"ref_moved"``. Defaults to the class's own.
    **context
        Plain values (str, int, float, bool, None) that a program may want; kept in :attr:`context`.
    """

    __module__ = "lamella"
    exit_code: ClassVar[int] = BUG_EXIT_CODE
    default_kind: ClassVar[str] = "error"

    def __init__(self, message: str, *, kind: str | None = None, **context: Any) -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind or self.default_kind
        self.context = context

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray and multiprocessing pickle every exception; keyword-only arguments need this.
        return _rebuild, (type(self), self.message, self.kind, self.context)


def _rebuild(cls: type[LamellaError], message: str, kind: str, context: dict[str, Any]) -> LamellaError:
    return cls(message, kind=kind, **context)


class InvalidInputError(LamellaError, ValueError):
    """The caller gave something that cannot be meant: a bad name, a malformed file, a wrong type."""

    __module__ = "lamella"
    exit_code = 2
    default_kind = "invalid_input"


class NotFoundError(LamellaError, KeyError):
    """Nothing of that name exists."""

    __module__ = "lamella"
    exit_code = 3
    default_kind = "not_found"


class RepositoryNotFoundError(NotFoundError):
    """There is no repository at that place."""

    __module__ = "lamella"
    default_kind = "repository_not_found"


class RefNotFoundError(NotFoundError):
    """The model has no branch, tag or alias of that name."""

    __module__ = "lamella"
    default_kind = "ref_not_found"


class VersionNotFoundError(NotFoundError):
    """No version has that number, id or prefix."""

    __module__ = "lamella"
    default_kind = "version_not_found"


class TensorNotFoundError(NotFoundError):
    """The version has no tensor of that name."""

    __module__ = "lamella"
    default_kind = "tensor_not_found"


class AlreadyExistsError(LamellaError):
    """Something of that name exists and may not be replaced."""

    __module__ = "lamella"
    exit_code = 4
    default_kind = "already_exists"


class ConflictError(LamellaError):
    """The branch is not where the caller expected it; ``context`` has ``expected`` and ``actual``."""

    __module__ = "lamella"
    exit_code = 4
    default_kind = "ref_moved"


class PermissionDeniedError(LamellaError):
    """The caller may not do this."""

    __module__ = "lamella"
    exit_code = 5
    default_kind = "permission_denied"


class CorruptionError(LamellaError):
    """Stored bytes break a rule of FORMAT.md, or something that a version names is missing."""

    __module__ = "lamella"
    exit_code = 6
    default_kind = "corruption"


class UnsupportedFormatError(LamellaError):
    """Written by a newer lamella than this one."""

    __module__ = "lamella"
    exit_code = 6
    default_kind = "unsupported_format"


class StorageError(LamellaError):
    """The disk or object store failed. ``transient`` says whether trying again may help."""

    __module__ = "lamella"
    exit_code = 7
    default_kind = "storage"

    @property
    def transient(self) -> bool:
        """Whether the same call may succeed later."""
        return bool(self.context.get("transient", False))


class OutcomeUnknownError(LamellaError):
    """A commit was sent and no reply could be had: it may or may not have happened.

    ``context["push_id"]`` names it. Nothing may be deleted on its account, and only a read of the log can tell.
    """

    __module__ = "lamella"
    exit_code = 8
    default_kind = "outcome_unknown"


class LimitError(LamellaError):
    """A limit or quota would be passed."""

    __module__ = "lamella"
    exit_code = 9
    default_kind = "limit"
