"""Documents as lines for people. Each function takes what ``--json`` prints; ``terminal`` escapes what it gives."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from lamella.cli.terminal import table

Document: TypeAlias = Mapping[str, Any]

SHORT_ID = 12
"""Digits of an id that people are shown: enough to be unique among millions of versions."""


def size(nbytes: int) -> str:
    """Return a number of bytes with a unit.

    >>> size(1023), size(1536), size(86 << 20)
    ('1023 bytes', '1.5 KiB', '86.0 MiB')
    """
    if nbytes < 1024:
        return f"{nbytes} byte{'s' * (nbytes != 1)}"
    value = float(nbytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1023.95:  # above, it would be shown as 1024.0 of this unit
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} PiB"


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: ``"1 tensor"``, ``"2 tensors"``."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def revision(version: Document) -> str:
    """Return the revision that names a version by its number."""
    return f"{version['model']}@v{version['number']}"


def log_line(version: Document) -> str:
    """Return a version as one line: its first line of message only."""
    message = str(version["message"]).split("\n", 1)[0]
    parts = [revision(version), version["id"][:SHORT_ID], version["created"], message, _metrics(version["metrics"])]
    return "  ".join(part for part in parts if part)


def push(version: Document) -> Iterator[str]:
    """Yield what a push did."""
    if not version["new"]:
        yield f"{revision(version)} {version['id'][:SHORT_ID]} is this already: nothing new was stored"
        return
    held = f"{count(version['tensor_count'], 'tensor')}, {size(version['decoded_nbytes'])}"
    yield f"pushed {revision(version)} {version['id'][:SHORT_ID]}: {held}"


def show(version: Document) -> Iterator[str]:
    """Yield everything about a version, then its tensors."""
    tensors = version["tensors"]
    yield f"{revision(version)}  {version['id']}"
    facts = [
        ("parents", " ".join(parent[:SHORT_ID] for parent in version["parents"])),
        ("created", version["created"]),
        ("author", version["author"]),
        ("parameters", version["parameters_id"]),
        ("structure", version["structure_id"]),
        ("files", " ".join(version["files"])),
        ("metrics", _metrics(version["metrics"])),
        ("recipe", "" if version["recipe"] is None else json.dumps(version["recipe"], ensure_ascii=False)),
        ("tensors", f"{count(len(tensors), 'tensor')}, {size(version['decoded_nbytes'])}"),
    ]
    yield from table([fact for fact in facts if fact[1]])
    if version["message"]:
        yield ""
        yield from (f"    {line}" for line in version["message"].rstrip("\n").split("\n"))
    yield ""
    rows = [(item["name"], item["dtype"], _shape(item["shape"]), size(item["nbytes"])) for item in tensors]
    yield from table([("name", "dtype", "shape", "size"), *rows], right=[3])


def checkout(done: Document) -> Iterator[str]:
    """Yield the files of a checkout."""
    rows = [(item["path"], size(item["nbytes"])) for item in done["files"]]
    yield f"checked out {revision(done)} {done['id'][:SHORT_ID]} into {done['out']}"
    yield from table([(f"    {path}", held) for path, held in rows], right=[1])


def distance(found: Document) -> Iterator[str]:
    """Yield a line for each tensor that differs, and one for all."""
    keys = ["changed", "l2", "l1", "linf"] + ["cosine"] * (found["cosine"] is not None)
    differing = {name: item for name, item in found["per_tensor"].items() if item["changed"]}
    rows = [
        (name, f"{item['changed']:.2%}", *(f"{item[key]:.6g}" for key in keys[1:]))
        for name, item in [*differing.items(), ("all", found)]
    ]
    yield from table([("tensor", *keys), *rows], right=range(1, len(keys) + 1))
    yield f"{len(differing):,} of {count(len(found['per_tensor']), 'tensor')} differ"


def diff(found: Document) -> Iterator[str]:
    """Yield a line for each tensor that is not the same, then how many there are of each."""
    marks = {"added": "+", "removed": "-", "reshaped": "#", "changed": "~"}
    for key, mark in marks.items():
        yield from (f"{mark} {name}" for name in found[key])
    yield ", ".join(f"{len(found[key]):,} {key} ({mark})" for key, mark in marks.items()) + (
        f", {len(found['same']):,} the same"
    )


def refs(found: Document) -> Iterator[str]:
    """Yield a line for each ref."""
    rows = [(_ref(ref), f"v{ref['number']}") for ref in found["refs"]]
    yield from table(rows)
    if not rows:
        yield "there are none"


def ref_set(done: Document) -> Iterator[str]:
    """Yield where a ref stands now."""
    ref = done["ref"]
    yield f"{ref['kind']} {_ref(ref)} stands at v{ref['number']}"


def ref_deleted(done: Document) -> Iterator[str]:
    """Yield what was, or would be, deleted."""
    ref = done["deleted"]
    done_or_not = "would delete" if done["dry_run"] else "deleted"
    yield f"{done_or_not} {ref['kind']} {_ref(ref)}, which stood at v{ref['number']}; versions stay"


def stats(found: Document) -> Iterator[str]:
    """Yield how large a repository is."""
    facts = [
        ("models", f"{found['models']:,}"),
        ("versions", f"{found['versions']:,}"),
        ("packs", f"{found['packs']:,}"),
    ]
    facts += [("decoded", size(found["decoded_nbytes"])), ("stored", size(found["stored_nbytes"]))]
    yield from table([*facts, ("ratio", f"{found['ratio']:.2f}")])


def verify(found: Document) -> Iterator[str]:
    """Yield each problem, then what was looked at."""
    yield from (f"{problem['where']}: {problem['message']} [{problem['kind']}]" for problem in found["problems"])
    looked_at = ", ".join(
        (
            count(found["entries"], "log entry", "log entries"),
            count(found["versions"], "version"),
            count(found["packs"], "pack"),
            count(found["blobs"], "blob"),
        )
    )
    depth = "read and decoded" if found["deep"] else "read"
    verdict = "no problems" if found["ok"] else count(len(found["problems"]), "problem")
    yield f"{verdict} in {looked_at} ({size(found['read_nbytes'])} {depth})"


def _metrics(metrics: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={value:.6g}" if type(value) is float else f"{name}={value}" for name, value in metrics.items()
    )


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def _ref(ref: Document) -> str:
    return f"{ref['model']}@{ref['name']}"
