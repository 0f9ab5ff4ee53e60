"""FORMAT.md, read by machine and compared with the code, so that neither can go its own way."""

import ast
import importlib
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from lamella_engine import chunking, codecs
from lamella_engine.chunking import grid
from lamella_engine.codecs import planes
from lamella_engine.dtypes import DTYPES
from lamella_engine.format import audit, canonical, entry, fold, manifest, names, pack, version
from lamella_engine.format.digests import Context, blob_digest, chunk_id

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "engine" / "lamella_engine"
DOCUMENT = (ROOT / "engine" / "FORMAT.md").read_text()
SECTIONS = dict(re.findall(r"^## \d+\. (.+?)\n(.*?)(?=^## |\Z)", DOCUMENT, re.DOTALL | re.MULTILINE))


def tables(section: str) -> list[list[dict[str, str]]]:
    """Return the tables of a section, each as rows by column; backticks and escapes are gone."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", SECTIONS[section], re.MULTILINE):
        header, _, *rows = (
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()
        )
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def table(section: str, *columns: str) -> list[dict[str, str]]:
    """Return the one table of a section that has exactly these columns."""
    (found,) = (rows for rows in tables(section) if tuple(rows[0]) == columns)
    return found


def plain(text: str) -> str:
    return text.strip("`")


def number(text: str) -> int:
    """Return the value of a number as the document writes it: ``2^20``, ``4 MiB + 1 KiB``, ``10^18 - 1``."""
    for unit, factor in (("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)):
        text = text.replace(f" {unit}", f" * {factor}")
    assert re.fullmatch(r"[0-9 ^*+-]+", text), text
    return eval(text.replace("^", "**"))


def test_the_sections_stand_in_their_order():
    numbers = re.findall(r"^## (\d+)\. ", DOCUMENT, re.MULTILINE)
    assert numbers == [str(n) for n in range(1, len(numbers) + 1)]
    assert len(SECTIONS) == len(numbers)


def test_references_lead_to_sections():
    last = len(SECTIONS)
    assert all(1 <= int(n) <= last for n in re.findall(r"section (\d+)", DOCUMENT))


def test_contexts_are_those_of_the_code():
    rows = table("Digests and contexts", "of", "context")
    assert {row["of"]: plain(row["context"]) for row in rows} == {context.name: context.value for context in Context}


def test_encodings_are_those_of_the_code():
    rows = table("Chunks and encodings", "id", "name", "needs base", "payload")
    assert [(int(row["id"]), row["name"], row["needs base"] == "yes") for row in rows] == [
        (encoding.value, encoding.name, codecs.needs_base(encoding)) for encoding in codecs.Encoding
    ]
    assert {row["needs base"] for row in rows} == {"yes", "no"}


def test_forms_of_planes_are_those_of_the_code():
    rows = table("Chunks and encodings", "form", "name", "length", "bytes")
    assert [(int(row["form"]), row["name"]) for row in rows] == [(form.value, form.name) for form in planes.Form]


def sizes_of(layout: struct.Struct) -> list[int]:
    """Return the bytes of each field of a little-endian layout."""
    assert layout.format.startswith("<")
    fields = re.findall(r"\d*[a-zA-Z]", layout.format)
    sizes = [struct.calcsize(f"<{field}") for field in fields]
    assert sum(sizes) == layout.size
    return sizes


def documented_sizes(section: str) -> list[list[int]]:
    layouts = [rows for rows in tables(section) if tuple(rows[0]) == ("field", "bytes", "meaning")]
    return [[int(row["bytes"]) for row in rows if row["bytes"].isdigit()] for rows in layouts]


def test_the_layout_of_packs_is_that_of_the_code():
    header, base_pack, row, footer = documented_sizes("Pack")
    assert header == sizes_of(pack._HEADER)
    assert base_pack == [struct.calcsize("<H")]
    assert row == sizes_of(pack._ROW)
    assert footer == sizes_of(pack._FOOTER)
    assert SECTIONS["Pack"].count(f"`{pack.PACK_MAGIC.hex(' ')}`") == 2
    assert f"{pack._THIS_PACK} for this pack, {pack._NO_BASE} for a full blob" in SECTIONS["Pack"]


def test_the_layout_of_planes_is_that_of_the_code():
    assert documented_sizes("Chunks and encodings") == [sizes_of(planes.PLANE_HEADER)]


def test_limits_are_those_of_the_code():
    for row in table("Limits", "limit", "value", "constant"):
        module, _, name = plain(row["constant"]).rpartition(".")
        assert number(row["value"]) == getattr(importlib.import_module(f"lamella_engine.{module}"), name), row


def test_every_limit_of_the_code_is_documented():
    documented = {plain(row["constant"]) for row in table("Limits", "limit", "value", "constant")}
    modules = {"chunking": chunking} | {
        f"format.{module.__name__.rpartition('.')[2]}": module
        for module in (audit, canonical, entry, fold, manifest, names, pack, version)
    }
    found = {
        f"{path}.{name}"
        for path, module in modules.items()
        for name in re.findall(r"^(MAX_[A-Z_]+) =", Path(module.__file__ or "").read_text(), re.MULTILINE)
    }
    assert found <= documented


def test_dtypes_are_those_of_the_code():
    rows = table("Manifest", "dtype", "bits", "lane")
    assert [(plain(row["dtype"]), int(row["bits"]), int(row["lane"])) for row in rows] == [
        (dtype.name, dtype.bits, dtype.lane) for dtype in DTYPES
    ]


def test_examples_of_the_grid_are_true():
    rows = table("Grid", "shape", "item size", "k", "L", "cells")
    assert len(rows) >= 8
    for row in rows:
        shape = tuple(ast.literal_eval(plain(row["shape"])))
        cells = grid(shape, int(row["item size"]))
        assert cells.cell_count == int(row["cells"])
        if row["k"] == "-":
            assert not shape or 0 in shape
        else:
            assert (cells.axis, cells.length) == (int(row["k"]), int(row["L"]))


def fields(section: str, column: str = "field", *, which: int = 0) -> set[str]:
    found = [rows for rows in tables(section) if next(iter(rows[0])) == column]
    return {plain(row[column]) for row in found[which]}


def test_fields_of_json_are_those_of_the_code():
    assert fields("Version") == set(version._DESCRIPTION)
    assert fields("Version", "field of `structure`") == set(version._DESCRIPTION["structure"])
    assert fields("Locator") == set(version._LOCATOR) | set(version._WHERE_NEEDED)
    assert fields("Log entries") == set(entry._GENESIS)
    assert fields("Log entries", which=1) == set(entry._ENTRY) | set(entry._WHERE_NEEDED)
    assert fields("Folds") == set(fold._ROOT) | set(fold._WHERE_NEEDED)
    assert [plain(row["table"]) for row in table("Folds", "table", "key", "row")] == list(fold.TABLES)


def kinds_in_the_code() -> set[str]:
    """Return every kind that a CorruptionError or a problem of verify is made with, but for what comes by wire."""
    found = set()
    wire = {ENGINE / "wire.py", *ENGINE.glob("remote/*.py"), *ENGINE.glob("service/*.py")}
    for path in set(ENGINE.rglob("*.py")) - wire:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            literals = [arg for keyword in node.keywords if keyword.arg == "kind" for arg in ast.walk(keyword.value)]
            if name == "Problem":
                literals = node.args[:1]
            if name in ("CorruptionError", "Problem"):
                found |= {arg.value for arg in literals if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


def test_kinds_of_corruption_are_those_of_the_code():
    documented = {plain(row["kind"]) for row in table("What is corruption", "kind", "condition")}
    # These two are chosen by an expression in content_store.packs.
    assert kinds_in_the_code() | {"missing_chunk", "base_too_deep"} == documented


# -- the worked example ------------------------------------------------------------------------------------------------


def hex_of(block: str) -> bytes:
    """Return the bytes of a dump: lines of offset, at most 16 bytes, and words."""
    data = b""
    for line in block.strip().splitlines():
        found = re.fullmatch(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} ?){1,16}) *(?:  .*)?", line)
        assert found is not None, line
        assert int(found[1], 16) == len(data), line
        data += bytes.fromhex(found[2])
    return data


EXAMPLE, DELTA = (hex_of(block) for block in re.findall(r"```hex\n(.*?)```", SECTIONS["Worked example"], re.DOTALL))
(NAME,) = re.findall(r"`(packs/[^`]+)`", SECTIONS["Worked example"])
W = (np.arange(12, dtype=np.float32) / 7).reshape(3, 4)
B = np.array([0.1, -0.0], np.float32)


def test_the_example_is_a_pack_that_the_code_reads():
    index_nbytes = pack.decode_footer(EXAMPLE[-8:], pack=NAME, pack_nbytes=len(EXAMPLE))
    index = pack.decode_pack_index(EXAMPLE[-8 - index_nbytes : -8], pack=NAME)
    chunks = []
    for row in index.rows:
        payload = EXAMPLE[row.start : row.stop]
        assert blob_digest(payload) == row.digest
        out = bytearray(row.decoded_nbytes)
        codecs.decode(row.encoding, payload, out, width=row.width)
        assert chunk_id(out) == row.chunk
        chunks.append(bytes(out))
    w, structure, cells = chunks
    assert w == W.tobytes()
    specs = manifest.parse_structure_page(structure)
    assert [(spec.name, spec.dtype.name, spec.shape) for spec in specs] == [
        ("b", "float32", (2,)),
        ("w", "float32", (3, 4)),
    ]
    assert list(manifest.cell_rows(cells, [8, 48])) == [B.tobytes(), chunk_id(w)]


def test_the_example_is_the_golden_pack():
    assert (ROOT / "tests" / "golden" / "v0" / "tiny" / NAME).read_bytes() == EXAMPLE


def test_the_words_of_the_example_say_what_its_bytes_say():
    words = dict(re.findall(r"^([0-9a-f]{4})  [0-9a-f ]+?  +(.*)$", SECTIONS["Worked example"], re.MULTILINE))
    assert any(f"{len(EXAMPLE) - 8 - 130} bytes" in text for text in words.values())
    index = pack.decode_pack_index(EXAMPLE[130:-8], pack=NAME)
    for row in index.rows:
        assert f"starts at byte {row.start}" in words.values()
        assert f"{row.encoded_nbytes} bytes encoded, {row.decoded_nbytes} decoded" in words.values()


def test_the_delta_of_the_example_decodes_against_its_base():
    out = bytearray(48)
    codecs.decode(codecs.Encoding.RESIDUAL_PLANES, DELTA, out, width=4, base=W.tobytes())
    assert bytes(out) == (W.view(np.uint32) + 3).tobytes()


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_the_residual_is_what_the_document_defines(width):
    bits = 8 * width
    mask, sign = (1 << bits) - 1, 1 << (bits - 1)

    def ordered(u: int) -> int:
        return u ^ (sign - 1) if u & sign else u

    def residual(x: int, base: int) -> int:
        d = (ordered(x) - ordered(base)) & mask
        if base & sign:
            d = -d & mask
        d = d - (1 << bits) if d & sign else d
        return (2 * d if d >= 0 else -2 * d - 1) & mask

    random = np.random.default_rng(width)
    dtype = np.dtype(f"<u{width}")
    special = [0, 1, sign, sign | 1, sign - 1, mask, mask - 1, sign >> 1]
    pairs = [(x, b) for x in special for b in special]
    pairs += [(int.from_bytes(random.bytes(width)), int.from_bytes(random.bytes(width))) for _ in range(200)]
    expected = np.array([x for x, _ in pairs], dtype)
    base = np.array([b for _, b in pairs], dtype)
    lanes = np.array([residual(x, b) for x, b in pairs], dtype)
    planes = lanes.view(np.uint8).reshape(-1, width).T
    payload = b"".join(struct.pack("<BI", 0, len(pairs)) + plane.tobytes() for plane in planes)
    out = bytearray(expected.nbytes)
    codecs.decode(codecs.Encoding.RESIDUAL_PLANES, payload, out, width=width, base=base.tobytes())
    assert bytes(out) == expected.tobytes()
