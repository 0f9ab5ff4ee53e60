"""How nouns travel: each comes back as it went, and bytes that are nothing of the kind are refused."""

import json
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lamella_engine import errors
from lamella_engine.content_store.seam import Blob, Missing, Planned, Reading
from lamella_engine.errors import CorruptionError, InvalidInputError, LamellaError, StorageError
from lamella_engine.format.digests import DIGEST_NBYTES
from lamella_engine.model import Cell, ChunkId
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.wire import (
    CELLS_AT_ONCE,
    FRAME_NBYTES,
    METHODS,
    RecordParser,
    batches,
    decode_answer,
    decode_cells,
    decode_error,
    decode_planned,
    decode_readings,
    encode_answer,
    encode_cells,
    encode_error,
    encode_planned,
    encode_reading,
    encode_record,
    frames,
    parse,
    status_of,
)

chunks = st.binary(min_size=DIGEST_NBYTES, max_size=DIGEST_NBYTES).filter(any).map(ChunkId)
names = st.text(max_size=20)
numbers = st.integers(0, 2**40)
cells = st.builds(Cell, st.none() | names, numbers)
blobs = st.builds(
    lambda chunk, encoding, width, lanes, payload, base: Blob(chunk, encoding, width, width * lanes, payload, base),
    chunks,
    st.integers(0, 255),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 1 << 16),
    st.binary(max_size=300),
    st.none() | chunks,
)
cuts = st.lists(st.integers(0, 400), max_size=40)


def pieces(data: bytes, at: list[int]) -> list[bytes]:
    """Cut bytes into pieces of these lengths, some of which may be none."""
    found = []
    for length in at:
        found.append(data[:length])
        data = data[length:]
    return [*found, data]


# -- records -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(blobs, st.sampled_from([0, 2, 4, 6])), max_size=6), cuts)
def test_records_come_back_as_they_went_wherever_they_are_cut(sent: list[tuple[Blob, int]], at: list[int]):
    data = b"".join(part for blob, flags in sent for part in map(bytes, encode_record(blob, flags)))
    parser, found = RecordParser(), []
    for piece in pieces(data, at):
        parser.feed(piece)
        while (record := parser.record()) is not None:
            found.append(record)
    assert [blob for blob, _ in found] == [blob for blob, _ in sent]
    assert [flags & ~1 for _, flags in found] == [flags for _, flags in sent]
    assert parser.waiting_nbytes == 0


def test_a_record_that_comes_byte_by_byte_costs_little_more():
    """Pieces of a list that is taken from at its front would make four million of these take hours."""
    blob = Blob(ChunkId(b"c" * 32), 0, 1, 1 << 16, bytes(1 << 16), None)
    data = b"".join(map(bytes, encode_record(blob)))
    parser = RecordParser()
    for at in range(len(data)):
        assert parser.record() is None
        parser.feed(data[at : at + 1])
    assert len(parser._pieces) < 40
    found = parser.record()
    assert found is not None
    assert bytes(found[0].payload) == blob.payload


GOOD = b"".join(map(bytes, encode_record(Blob(ChunkId(b"c" * 32), 0, 4, 64, b"p" * 64, None))))


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (80, (0).to_bytes(4, "little")),  # decoded bytes: none
        (80, (63).to_bytes(4, "little")),  # no whole lanes
        (80, (1 << 31).to_bytes(4, "little")),  # more than a cell has
        (84, (1 << 31).to_bytes(4, "little")),  # a payload that nobody waits for
        (89, b"\x03"),  # a lane of three bytes
        (89, b"\x00"),
        (90, b"\x01"),  # a base that is not named
        (32, b"b"),  # a base that the flags know nothing of
    ],
)
def test_a_header_that_breaks_a_rule_is_refused_before_its_payload_has_come(at: int, value: bytes):
    parser = RecordParser()
    parser.feed((GOOD[:at] + value + GOOD[at + len(value) :])[:92])
    with pytest.raises(CorruptionError) as error:
        parser.record()
    assert error.value.kind == "bad_record"


def test_a_payload_that_was_changed_on_its_way_is_refused():
    parser = RecordParser()
    parser.feed(GOOD[:-1] + b"q")
    with pytest.raises(CorruptionError) as error:
        parser.record()
    assert error.value.kind == "changed_on_its_way"


@given(st.binary(max_size=400), cuts)
def test_bytes_that_are_no_records_end_in_an_error_of_ours_or_wait_for_more(data: bytes, at: list[int]):
    parser = RecordParser()
    try:
        for piece in pieces(data, at):
            parser.feed(piece)
            while parser.record() is not None:
                pass
    except CorruptionError:
        return
    assert parser.waiting_nbytes <= len(data)


@given(st.lists(st.integers(0, 5 << 19), max_size=4))
@example([FRAME_NBYTES])
@example([FRAME_NBYTES - 1, 2])
def test_frames_are_full_but_for_the_last_and_nothing_is_lost(lengths: list[int]):
    parts = [bytes([number]) * length for number, length in enumerate(lengths)]
    found = list(frames(parts))
    assert b"".join(found) == b"".join(parts)
    assert all(len(frame) == FRAME_NBYTES for frame in found[:-1])
    assert all(found)


@given(st.lists(st.tuples(cells, st.lists(blobs, max_size=3)), max_size=5), cuts)
def test_readings_come_back_as_they_went(items: list[tuple[Cell, list[Blob]]], at: list[int]):
    sent = [Reading(cell, tuple(chain)) for cell, chain in items]
    data = b"".join(part for reading in sent for part in map(bytes, encode_reading(reading)))
    assert list(decode_readings(pieces(data, at), [reading.cell for reading in sent])) == sent


def test_readings_that_end_early_or_go_on_are_refused():
    blob = Blob(ChunkId(b"c" * 32), 0, 4, 64, b"p" * 64, None)
    data = b"".join(map(bytes, encode_reading(Reading(Cell("w", 0), (blob,)))))
    for broken, kind in ((data[:-1], "short_stream"), (b"", "short_stream"), (data + b"x", "long_stream")):
        with pytest.raises(CorruptionError) as error:
            list(decode_readings([broken], [Cell("w", 0)]))
        assert error.value.kind == kind
    with pytest.raises(CorruptionError):
        list(decode_readings([data, b"", b"more"], [Cell("w", 0)]))


# -- cells and plans ---------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(cells, st.none() | chunks), max_size=30))
@example([(Cell("w", number), None) for number in range(5)])
@example([(Cell(None, 0), None), (Cell("", 1), None)])
def test_cells_come_back_as_they_went(sent: list[tuple[Cell, ChunkId | None]]):
    assert list(decode_cells(encode_cells(sent))) == sent


def test_neighbours_travel_as_one_run():
    runs = encode_cells((Cell("w", number), None) for number in range(1000))
    assert [(run.tensor, run.first, run.count) for run in runs] == [("w", 0, 1000)]


def test_more_cells_than_are_allowed_are_refused_before_one_is_made():
    half = pb.CellRun(tensor="w", count=CELLS_AT_ONCE // 2)
    assert sum(1 for _ in decode_cells([half, half])) == CELLS_AT_ONCE
    for runs in ([half, half, pb.CellRun(count=1)], [pb.CellRun(count=2**32 - 1)]):
        with pytest.raises(InvalidInputError) as error:
            next(decode_cells(runs))
        assert error.value.kind == "too_many_cells"


companions = st.none() | st.builds(Cell, names, numbers)
planned = st.builds(Planned, cells, chunks, companions, st.just(0))


@given(planned)
def test_a_planned_cell_comes_back_as_it_went(sent: Planned):
    assert decode_planned(pb.PlannedCell.FromString(encode_planned(sent).SerializeToString())) == sent


@given(planned, st.none() | chunks, st.none() | chunks, st.booleans())
def test_an_answer_comes_back_as_it_went(asked: Planned, base, companion, missing: bool):
    answer = Missing(asked.cell, asked.chunk, base, companion) if missing else None
    assert decode_answer(asked, encode_answer(answer)) == answer


@pytest.mark.parametrize("id", [b"", b"c" * 31, b"c" * 33])
def test_what_is_not_as_long_as_a_chunk_id_is_none(id: bytes):
    with pytest.raises(InvalidInputError):
        decode_planned(pb.PlannedCell(tensor="w", chunk=id))
    if id:
        with pytest.raises(InvalidInputError):
            list(decode_cells([pb.CellRun(tensor="w", count=1, held=id)]))


@given(st.lists(st.integers(), max_size=50), st.integers(1, 9))
def test_batches_are_full_but_for_the_last(items: list[int], size: int):
    found = list(batches(items, size))
    assert [item for batch in found for item in batch] == items
    assert all(len(batch) == size for batch in found[:-1])


# -- errors ------------------------------------------------------------------------------------------------------------

CLASSES = sorted(
    (found for found in vars(errors).values() if isinstance(found, type) and issubclass(found, LamellaError)),
    key=lambda found: found.__name__,
)
values = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=20)


@given(
    st.sampled_from(CLASSES),
    st.text(max_size=80),
    st.text(min_size=1, max_size=20),
    st.dictionaries(st.sampled_from(["repository", "ref", "expected", "push_id"]), values),
    st.booleans(),
)
def test_an_error_comes_back_as_it_went(cls: type[LamellaError], message: str, kind: str, context, transient: bool):
    if cls is StorageError:
        context |= {"transient": transient}
    sent = cls(message, kind=kind, **context)
    found = decode_error(encode_error(sent))
    assert type(found) is cls
    assert (found.message, found.kind, found.context) == (sent.message, sent.kind, sent.context)
    assert getattr(found, "transient", None) == getattr(sent, "transient", None)


@pytest.mark.parametrize("long", ["x" * 10_000, "\x00" * 10_000, "🙂" * 10_000])
def test_an_error_fits_into_a_trailer_whatever_it_says(long: str):
    data = encode_error(InvalidInputError(long, name=long))
    assert len(data) <= 4096
    assert isinstance(decode_error(data), InvalidInputError)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"null",
        b"{}",
        json.dumps({"class": "SystemExit", "message": "", "kind": "k", "context": {}}).encode(),
        json.dumps({"class": "InvalidInputError", "message": "", "kind": "k", "context": []}).encode(),
        json.dumps({"class": "InvalidInputError", "message": "", "kind": "k", "context": {"message": "m"}}).encode(),
        json.dumps({"class": ["x"], "message": "", "kind": "k", "context": {}}).encode(),
    ],
)
def test_a_trailer_that_is_no_error_is_one_of_storage(data: bytes):
    found = decode_error(data)
    assert isinstance(found, StorageError)
    assert (found.kind, found.transient) == ("bad_error", False)


def test_every_class_of_error_has_a_status_and_only_bugs_and_storage_are_internal():
    internal = {cls.__name__ for cls in CLASSES if status_of(cls("m")).name == "INTERNAL"}
    assert internal == {"LamellaError", "StorageError"}
    assert status_of(StorageError("m", transient=True)).name == "UNAVAILABLE"


# -- messages ----------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_bytes_are_a_message_or_the_caller_s_mistake(data: bytes):
    for method in METHODS.values():
        if method.request is not None:
            with suppress(InvalidInputError):
                parse(method.request, data)
