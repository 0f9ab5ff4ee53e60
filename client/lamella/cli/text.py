"""Documents as lines for people. Most take what ``--json`` prints; ``terminal`` escapes what they give."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

import lamella

Document: TypeAlias = Mapping[str, Any]

SHORT_ID = 12
"""Digits of an id that people are shown: enough to be unique among millions of versions."""


def printable(text: str) -> str:
    r"""Return ``text`` with everything that could drive a terminal, or be no character at all, as ``\x1b`` and alike.

    Escaped are control and format characters (line ends and the overrides of writing direction among them), odd spaces,
    and the halves of characters that stand for undecodable bytes in names. Applying it twice changes nothing more.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def table(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> Iterator[str]:
    """Yield rows as lines with their columns aligned, those of ``right`` at their right edge."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    flush_right = set(right)
    for row in rows:
        cells = (
            cell.rjust(width) if place in flush_right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


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


def progress(done_nbytes: int, total_nbytes: int, stored_nbytes: int, *, seconds: float) -> str:
    """Return how far a push or a checkout has come: bytes, how much smaller they are stored, and how fast it goes.

    >>> progress(43 << 20, 86 << 20, 10 << 20, seconds=0.5)
    '43.0 MiB of 86.0 MiB, 4.3x smaller, 86.0 MiB/s'
    """
    parts = [f"{size(done_nbytes)} of {size(total_nbytes)}"]
    if stored_nbytes:
        parts.append(f"{done_nbytes / stored_nbytes:.1f}x smaller")
    if seconds > 0:
        parts.append(f"{size(round(done_nbytes / seconds))}/s")
    return ", ".join(parts)


def revision(version: Document) -> str:
    """Return the revision that names a version by its number."""
    return f"{version['model']}@v{version['number']}"


def log_line(version: Document) -> str:
    """Return a version as one line: its first line of message only."""
    refs = f"({', '.join(version['refs'])})" if version["refs"] else ""
    message = str(version["message"]).split("\n", 1)[0]
    parts = [revision(version), refs, version["id"][:SHORT_ID], version["created"], message]
    return "  ".join(part for part in [*parts, _metrics(version["metrics"])] if part)


def push(version: Document) -> Iterator[str]:
    """Yield what a push did."""
    if not version["new"]:
        yield f"{revision(version)} {version['id'][:SHORT_ID]} is this already: nothing new was stored"
        return
    held = f"{count(version['tensor_count'], 'tensor')}, {size(version['decoded_nbytes'])}"
    yield f"pushed {revision(version)} {version['id'][:SHORT_ID]}: {held}"


def show(found: Document) -> Iterator[str]:
    """Yield everything about each version, then its tensors."""
    for place, version in enumerate(found["versions"]):
        if place:
            yield ""
        yield from _version(version)


def _version(version: Document) -> Iterator[str]:
    cost = version["checkout"]
    yield f"{revision(version)}  {version['id']}"
    facts = [
        ("refs", " ".join(version["refs"])),
        ("parents", " ".join(parent[:SHORT_ID] for parent in version["parents"])),
        ("created", version["created"]),
        ("author", version["author"]),
        ("parameters", version["parameters_id"]),
        ("structure", version["structure_id"]),
        ("files", " ".join(version["files"])),
        ("metrics", _metrics(version["metrics"])),
        ("recipe", "" if version["recipe"] is None else json.dumps(version["recipe"], ensure_ascii=False)),
        ("tensors", f"{count(version['tensor_count'], 'tensor')}, {size(version['decoded_nbytes'])}"),
    ]
    yield from table([fact for fact in facts if fact[1]])
    if version["message"]:
        yield ""
        yield from (f"    {line}" for line in version["message"].rstrip("\n").split("\n"))
    yield ""
    rows = [
        (
            item["name"],
            item["dtype"],
            _shape(item["shape"]),
            size(item["decoded_nbytes"]),
            size(item["encoded_nbytes"]),
            str(item["max_depth"]),
        )
        for item in version["tensors"]
    ]
    yield from table([("name", "dtype", "shape", "size", "stored", "depth"), *rows], right=[3, 4, 5])
    yield (
        f"a checkout reads {size(cost['read_nbytes'])} in {count(cost['blob_count'], 'blob')}, "
        f"chains up to {cost['max_depth']} deep, for {size(cost['decoded_nbytes'])}"
    )


def checkout(done: Document) -> Iterator[str]:
    """Yield the files of a checkout."""
    rows = [(item["path"], size(item["nbytes"])) for item in done["files"]]
    yield f"checked out {revision(done)} {done['id'][:SHORT_ID]} into {done['out']}"
    yield from table([(f"    {path}", held) for path, held in rows], right=[1])


def distance(found: Document, *, by: str, most: int | None) -> Iterator[str]:
    """Yield a line for each tensor that differs, sorted by a measure, at most so many, and one for all."""
    keys = ["changed", "l2", "l1", "linf"] + ["cosine"] * (found["cosine"] is not None)
    differing = {name: item for name, item in sorted(found["per_tensor"].items()) if item["changed"]}
    names = list(differing)
    if by != "name":
        names.sort(key=lambda name: _falling(differing[name][by]))
    rows = [
        (name, f"{item['changed']:.2%}", *(f"{item[key]:.6g}" for key in keys[1:]))
        for name, item in [*((name, differing[name]) for name in names[:most]), ("all", found)]
    ]
    *lines, last = table([("tensor", *keys), *rows], right=range(1, len(keys) + 1))
    yield from lines
    yield from _more(len(names), most)
    yield last
    yield f"{len(differing):,} of {count(len(found['per_tensor']), 'tensor')} differ"


_MARKS = {"added": "+", "removed": "-", "reshaped": "#", "changed": "~"}


def diff(found: Document, *, by: str, most: int | None) -> Iterator[str]:
    """Yield a line for each tensor that is not the same, at most so many, then how many there are of each."""
    differing = sorted((item for item in found["tensors"] if item["change"] != "same"), key=lambda item: item["name"])
    if by == "size":
        differing.sort(key=lambda item: -max(one["decoded_nbytes"] for one in (item["a"], item["b"]) if one))
    rows = [
        (
            f"{_MARKS[item['change']]} {item['name']}",
            _before_after(item, "dtype", str),
            _before_after(item, "shape", _shape),
            _before_after(item, "decoded_nbytes", size),
        )
        for item in differing[:most]
    ]
    if rows:
        yield from table(rows, right=[3])
    yield from _more(len(differing), most)
    changes = [item["change"] for item in found["tensors"]]
    yield ", ".join(f"{changes.count(change):,} {change} ({mark})" for change, mark in _MARKS.items()) + (
        f", {changes.count('same'):,} the same"
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
    yield from (_problem(lamella.Problem(**problem)) for problem in found["problems"])
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
    if found["vouched"]:
        yield f"{count(found['vouched'], 'pack')} that only their writers had decoded may serve any push from now on"


def _problem(problem: lamella.Problem) -> str:
    return f"{problem.where}: {problem.message} [{problem.kind}]"


def audit(found: Iterable[lamella.Act | lamella.NotedRead | lamella.Problem]) -> Iterator[str]:
    """Yield a line for each thing that an audit tells, as it is told, then how many there were."""
    acts = notes = unvouched = problems = 0
    for one in found:
        match one:
            case lamella.Act():
                acts += 1
                signed = f", signed {one.signer[:12]}" if one.signer else ""
                yield f"{one.time}  {one.principal or '(nobody)'}: {'; '.join(one.did)}  [entry {one.number}{signed}]"
            case lamella.NotedRead():
                notes += 1
                unvouched += not one.vouched
                loose = "" if one.vouched else "  [not vouched for yet]"
                yield f"{one.time}  {one.principal} from {one.peer}: {one.rpc} {one.what}{loose}"
            case lamella.Problem():
                problems += 1
                yield _problem(one)
    verdict = count(problems, "problem") if problems else "no problems"
    loose = f", of which {unvouched:,} not vouched for yet" if unvouched else ""
    yield f"{verdict} in {count(acts, 'act')} and {count(notes, 'note')} of a service{loose}"


def keygen(made: Document) -> Iterator[str]:
    """Yield where the key is, and its public half."""
    yield f"wrote {made['path']}: keep it to yourself"
    yield f"public key {made['public_key']}"


def signers(found: Document) -> Iterator[str]:
    """Yield each key of which one has to sign."""
    yield from found["signers"] or ["nothing has to be signed"]


def serve(found: Document) -> Iterator[str]:
    """Yield where a service answers, on one line."""
    told = "" if found["metrics"] is None else f", metrics at http://{found['metrics']}/metrics"
    yield f"serving {found['root']} at {found['address']}{told}"


def token(found: Document) -> Iterator[str]:
    """Yield what was done to tokens; a new one alone on its line, for others to read."""
    match found:
        case {"secret": None, "token": made}:
            yield f"granted {made['id']} to {made['principal']}"
        case {"secret": str(secret)}:
            yield secret
        case {"revoked": id}:
            yield f"revoked {id}"
        case {"tokens": tokens}:
            heads = [("ID", "PRINCIPAL", "ROLE", "REPOSITORIES", "REFS", "ENDS")]
            yield from table([*heads, *(_token_row(one) for one in tokens)])


def _token_row(token: Document) -> tuple[str, ...]:
    ends = "never" if not token["expires"] else datetime.fromtimestamp(token["expires"], UTC).strftime("%Y-%m-%d %H:%M")
    ends = "revoked" if token["revoked"] else ends
    return (
        token["id"],
        token["principal"],
        token["role"],
        " ".join(token["repositories"]),
        " ".join(token["refs"]),
        ends,
    )


def _falling(value: float) -> float:
    """Return a key that puts the greatest first, and before it what is no number: it wants looking at most."""
    return -math.inf if math.isnan(value) else -value


def _more(found: int, most: int | None) -> Iterator[str]:
    if most is not None and found > most:
        yield f"... and {found - most:,} more: -n {found} shows them all"


def _before_after(item: Document, key: str, said: Any) -> str:
    """Return what a tensor is in a and, if that is something else, in b."""
    values = [said(one[key]) for one in (item["a"], item["b"]) if one]
    return " -> ".join(dict.fromkeys(values))


def _metrics(metrics: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={value:.6g}" if type(value) is float else f"{name}={value}" for name, value in metrics.items()
    )


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def _ref(ref: Document) -> str:
    return f"{ref['model']}@{ref['name']}"
