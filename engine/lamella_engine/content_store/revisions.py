"""Revisions: the ways to name one version."""

import re
from dataclasses import dataclass

from lamella_engine.errors import InvalidInputError
from lamella_engine.model import check_name, check_ref_name

MAX_ANCESTORS = 1_000_000
"""Greatest N of ``~N``; a longer walk is a slip of the finger."""


@dataclass(frozen=True, slots=True)
class Revision:
    """A revision taken apart: exactly one of ``id_prefix``, ``number``, ``ref``, ``best`` and ``latest`` is set."""

    model: str | None
    """None only for an id, which needs no model."""
    id_prefix: str | None = None
    number: int | None = None
    ref: str | None = None
    best: str | None = None
    """Name of a metric; the version with its greatest value is meant."""
    latest: bool = False
    ancestors: int = 0
    """How many times to go to the first parent afterwards."""


def parse_revision(text: str) -> Revision:
    """Take a revision apart. Raises InvalidInputError for what can be none.

    ``model@ref``, ``model@v12``, ``model@latest``, ``model@best:metric``, ``model@<id>``, ``<id>``, where an id may
    be a prefix of at least 8 hex digits; each may end in ``~N``.
    """
    if not isinstance(text, str):
        raise InvalidInputError(f"a revision is text, not a {type(text).__name__}", kind="bad_revision")
    body, _, tilde = text.partition("~")
    ancestors = 0
    if tilde or text.endswith("~"):
        if re.fullmatch("[0-9]{1,7}", tilde) is None or int(tilde) > MAX_ANCESTORS:
            raise _bad(text, "'~' wants a number after it")
        ancestors = int(tilde)
    model, at, name = body.partition("@")
    if not at:
        if _is_id(body):
            return Revision(None, id_prefix=body, ancestors=ancestors)
        raise _bad(text, "write model@branch, model@v12, or at least 8 hex digits of an id")
    check_name(model, what="model")
    if _is_id(name):
        return Revision(model, id_prefix=name, ancestors=ancestors)
    if re.fullmatch("v[0-9]{1,18}", name):
        return Revision(model, number=int(name[1:]), ancestors=ancestors)
    if name == "latest":
        return Revision(model, latest=True, ancestors=ancestors)
    if name.startswith("best:"):
        if not name[5:]:
            raise _bad(text, "'best:' wants the name of a metric after it")
        return Revision(model, best=name[5:], ancestors=ancestors)
    return Revision(model, ref=check_ref_name(name), ancestors=ancestors)


def parse_target(text: str) -> tuple[str, str]:
    """Return model and ref of ``model@ref``, the only form that can be pushed to or moved. Raises InvalidInputError."""
    if not isinstance(text, str) or text.count("@") != 1:
        raise InvalidInputError(f"{text!r} names no branch, tag or alias: write model@name", kind="bad_target")
    model, _, ref = text.partition("@")
    return check_name(model, what="model"), check_ref_name(ref)


def _is_id(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{8,64}", text) is not None


def _bad(text: object, why: str) -> InvalidInputError:
    return InvalidInputError(f"{text!r} names no version: {why}", kind="bad_revision")
