"""Notes: what is recorded of a version beside its tensors, as callers give it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lamella_engine.errors import InvalidInputError
from lamella_engine.format import canonical
from lamella_engine.model import Attachment


@dataclass(frozen=True, slots=True)
class Notes:
    """What is recorded beside the tensors."""

    message: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    recipe: Any = None


def attachments_of(files: Mapping[str, bytes] | None) -> list[Attachment]:
    """Return files by path as attachments; raises InvalidInputError unless they are bytes."""
    for path, data in dict(files or {}).items():
        if not isinstance(path, str) or not isinstance(data, bytes):
            raise InvalidInputError("files are bytes by path: {'config.json': b'...'}", kind="bad_value")
    return [Attachment.of_bytes(path, "file", data) for path, data in dict(files or {}).items()]


def notes_of(message: str, metrics: Mapping[str, float] | None, recipe: Any) -> Notes:
    """Return what a caller gave, if it can be stored; raises InvalidInputError."""
    # As deep as it will stand; refused now, not after the upload, and a copy, which does not change meanwhile.
    (copied,) = canonical.loads(canonical.dumps([recipe]), what="a recipe")
    return Notes(message=_text(message), metrics=_metrics(metrics), recipe=copied)


def _text(message: str) -> str:
    if not isinstance(message, str):
        raise InvalidInputError(f"a message is text, not a {type(message).__name__}", kind="bad_value")
    canonical.dumps(message)
    return message


def _metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    if metrics is not None and not isinstance(metrics, Mapping):
        raise InvalidInputError(f"metrics are numbers by name, not a {type(metrics).__name__}", kind="bad_metric")
    stored = canonical.loads(canonical.dumps(dict(metrics or {})), what="metrics")
    for name, value in stored.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InvalidInputError(f"the metric {name!r} is no number: put it into the recipe", kind="bad_metric")
    return dict(stored)
