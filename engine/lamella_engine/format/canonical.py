"""Canonical JSON: one byte string for one value, because ids are digests of stored bytes (FORMAT.md, "Canonical JSON").

Sorted keys, no spaces, UTF-8, no escapes that JSON does not force. JSON has no NaN or infinities, so a float that is
not finite is written as ``{"$float": "NaN"}`` (or ``"Infinity"``, ``"-Infinity"``).
"""

import json
import math
from typing import Any

from lamella_engine.errors import CorruptionError, InvalidInputError, UnsupportedFormatError

MAX_DEPTH = 64
"""Deepest nesting accepted; far beyond any recipe, far below the parser's own recursion limit."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dumps(value: Any) -> bytes:
    """Return the canonical bytes of a value made of dict, list, tuple, str, int, float, bool and None.

    Raises InvalidInputError for any other type, for keys that are not str, for text that UTF-8 cannot hold, and for
    integers of thousands of digits.
    """
    plain = _plain(value, MAX_DEPTH)
    try:
        return _ENCODER.encode(plain).encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"text that is no valid Unicode cannot be stored: {error}", kind="bad_text") from None
    except ValueError as error:  # Python writes no integer of more than 4,300 digits
        raise InvalidInputError(f"a number cannot be stored: {error}", kind="bad_value") from None


def _plain(value: Any, depth: int) -> Any:
    if depth == 0:
        raise InvalidInputError(f"nested deeper than {MAX_DEPTH} levels: flatten it", kind="too_deep")
    if value is None or type(value) in (str, int, bool):  # by far the most, so first
        return value
    match value:
        case str():
            return str(value)
        case int():
            return int(value)
        case float():
            if math.isfinite(value):
                return float(value)
            return {"$float": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
        case dict():
            if "$float" in value:
                raise InvalidInputError("the key '$float' is taken: rename it", kind="bad_key")
            for key in value:
                if not isinstance(key, str):
                    raise InvalidInputError(f"the key {key!r} is not a string", kind="bad_key")
            return {key: _plain(item, depth - 1) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, depth - 1) for item in value]
    scalar = getattr(value, "item", None)  # a NumPy or torch scalar, as metrics often are
    if callable(scalar) and getattr(value, "ndim", None) == 0:
        return _plain(scalar(), depth)
    raise InvalidInputError(
        f"a {type(value).__name__} cannot be stored here: use numbers, text, lists and dicts", kind="bad_value"
    )


def loads(data: bytes, *, what: str) -> Any:
    """Parse canonical bytes; raises CorruptionError, naming ``what``, unless ``dumps`` would give the same bytes."""
    try:
        value = _DECODER.decode(data.decode())
        same = dumps(value) == data
    except (ValueError, RecursionError) as error:  # InvalidInputError is a ValueError too
        raise CorruptionError(f"{what} is not canonical JSON: {error}", kind="bad_json") from None
    if not same:
        raise CorruptionError(f"{what} is JSON, but not in canonical form", kind="bad_json")
    return value


def load_lines(data: bytes, *, what: str) -> list[Any]:
    """Parse lines of canonical JSON, each ended by a line feed; raises CorruptionError, naming ``what``."""
    *lines, rest = data.split(b"\n")
    if rest:
        raise CorruptionError(f"{what} does not end with a line", kind="bad_json")
    try:
        values = [_DECODER.decode(line.decode()) for line in lines]
        # No string of JSON holds a line feed, so the lines are canonical if and only if their list is.
        same = dumps(values) == b"[" + b",".join(lines) + b"]"
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{what} is not canonical JSON: {error}", kind="bad_json") from None
    if not same:
        raise CorruptionError(f"{what} is JSON, but not in canonical form", kind="bad_json")
    return values


def _pairs(pairs: list[tuple[str, Any]]) -> Any:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    if "$float" in value:
        name = value["$float"]
        if len(value) != 1 or not isinstance(name, str) or name not in _NON_FINITE:
            raise ValueError("a malformed $float")
        return _NON_FINITE[name]
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_refuse)


def conform(value: Any, schema: Any, *, what: str) -> None:
    """Check parsed JSON against a schema written as an example of itself.

    ``str``, ``int``, ``bool``, ``float`` stand for themselves (an int is a float too), ``object`` for anything, ``[s]``
    for a list of s, ``(s, t)`` for a list of exactly those, ``{"key": s}`` for a dict of exactly those keys,
    ``{str: s}`` for a dict of any keys, and ``{s, None}`` for s or null. An int may not be negative.

    Raises CorruptionError for what does not fit, and UnsupportedFormatError for a key that this lamella does not know.
    """
    match schema:
        case set():
            if value is None:
                return
            (schema,) = schema - {None}
            conform(value, schema, what=what)
        case list():
            _expect(isinstance(value, list), value, what)
            for item in value:
                conform(item, schema[0], what=what)
        case tuple():
            _expect(isinstance(value, list) and len(value) == len(schema), value, what)
            for item, item_schema in zip(value, schema, strict=True):
                conform(item, item_schema, what=what)
        case dict():
            _expect(isinstance(value, dict), value, what)
            if str in schema:
                for item in value.values():
                    conform(item, schema[str], what=what)
                return
            if unknown := value.keys() - schema.keys():
                raise UnsupportedFormatError(
                    f"{what} has the field {min(unknown)!r}, which this lamella does not know: upgrade lamella"
                )
            _expect(schema.keys() <= value.keys(), value, what)
            for key, item_schema in schema.items():
                conform(value[key], item_schema, what=f"{key} of {what}")
        case type():
            if schema is float:
                fits = isinstance(value, int | float) and not isinstance(value, bool)
            elif schema is int:
                fits = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            else:
                fits = isinstance(value, schema)
            _expect(fits, value, what)


def _expect(fits: bool, value: Any, what: str) -> None:
    if not fits:
        raise CorruptionError(f"{what} cannot be {str(value)[:40]!r}", kind="bad_field")
