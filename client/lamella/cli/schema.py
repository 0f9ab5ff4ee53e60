"""What ``--json`` promises: ``schema.json``, one definition for each verb and one for errors.

In ``$defs``, a verb's document has the verb's name and what documents are made of has a name with a capital.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

Schema: TypeAlias = Mapping[str, Any]

ERROR = "error"
"""Name of the definition of what a verb that fails writes to stderr."""

_REF = "#/$defs/"


@cache
def schema() -> Schema:
    """Return the whole: JSON Schema, draft 2020-12."""
    found: Schema = json.loads(Path(__file__).with_name("schema.json").read_text("utf-8"))
    return found


def schema_of(name: str) -> Schema:
    """Return the schema of one verb's document, or of errors, with the definitions that it needs.

    Raises KeyError if it has none.
    """
    definitions = schema()["$defs"]
    needed: dict[str, Schema] = {}

    def need(name: str) -> None:
        if name not in needed:
            needed[name] = definitions[name]
            for used in _uses(definitions[name]):
                need(used)

    need(name)
    return {"$schema": schema()["$schema"], "$ref": f"{_REF}{name}", "$defs": needed}


def keys(name: str) -> str:
    """Return the keys of a verb's document in a line: ``{}`` is an object, ``[]`` a list."""
    part = schema()["$defs"][name]
    said = _said(part) or str(part["description"]).rstrip(".")
    return said.removeprefix("{").removesuffix("}").replace("} or {", "; or ")


def _uses(part: Any) -> Iterator[str]:
    """Yield the names of the definitions that a part of the schema refers to."""
    if isinstance(part, dict):
        if str(part.get("$ref", "")).startswith(_REF):
            yield part["$ref"].removeprefix(_REF)
        for inner in part.values():
            yield from _uses(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _uses(inner)


def _said(part: Schema) -> str:
    """Return what a value is made of; nothing for one that has no parts."""
    match part:
        case {"oneOf": alternatives}:
            return " or ".join(filter(None, map(_said, alternatives)))
        case {"$ref": str(ref), **rest} if ref.startswith(_REF) and not rest:
            return _said(schema()["$defs"][ref.removeprefix(_REF)])
        case {"type": "array", "items": items}:
            return f"[{_said(items)}]"
        case {"type": "object", "additionalProperties": dict(items)} if _said(items):
            return f"{{name: {_said(items)}}}"
    properties = _properties(part)
    if not properties:
        return ""
    return f"{{{', '.join(f'{name} {_said(inner)}'.rstrip() for name, inner in properties.items())}}}"


def _properties(part: Schema) -> dict[str, Schema]:
    """Return the properties of an object, those of the definition that it extends first."""
    found: dict[str, Schema] = {}
    for inner in part.get("allOf", ()):
        found |= _properties(inner)
    if str(part.get("$ref", "")).startswith(_REF):
        found |= _properties(schema()["$defs"][part["$ref"].removeprefix(_REF)])
    found |= part.get("properties", {})
    return found
