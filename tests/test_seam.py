"""A push believes nothing that it is handed: blobs must be asked for, stand on what it offered, and decode."""

from dataclasses import replace

import ml_dtypes
import pytest
from support import new_repository, noise, store_of

from lamella_engine.codecs import Encoding, encode
from lamella_engine.content_store.acting import new_push_id
from lamella_engine.content_store.seam import COMPANION_REACH, Blob, Planned
from lamella_engine.errors import InvalidInputError
from lamella_engine.format.digests import chunk_id
from lamella_engine.model import Cell

MASTER = noise(0, 4096)
SHORT = MASTER.astype(ml_dtypes.bfloat16)
CELLS = {"master": Cell("master", 0), "short": Cell("short", 0)}
IDS = {"master": chunk_id(MASTER.tobytes()), "short": chunk_id(SHORT.tobytes())}
FULL = {
    "master": Blob(IDS["master"], Encoding.RAW, 4, MASTER.nbytes, MASTER.tobytes(), None),
    "short": Blob(IDS["short"], Encoding.RAW, 2, SHORT.nbytes, SHORT.tobytes(), None),
}
CAST = Blob(IDS["short"], Encoding.CAST, 2, SHORT.nbytes, b"\x00", IDS["master"])


@pytest.fixture
def push():
    return store_of(new_repository()).begin("m", "main", parent=None, push_id=new_push_id())


def plan(push, *cells: Planned):
    return list(push.plan(cells))


def refused(push, *blobs: Blob) -> str:
    with pytest.raises(InvalidInputError) as error:
        push.write(blobs)
    return error.value.kind


def test_a_companion_is_offered_once_it_was_planned():
    push = store_of(new_repository()).begin("m", "main", parent=None, push_id=new_push_id())
    first, second = plan(
        push, Planned(CELLS["master"], IDS["master"]), Planned(CELLS["short"], IDS["short"], CELLS["master"])
    )
    assert (first.companion, second.companion) == (None, IDS["master"])
    push.write([FULL["master"], CAST])


def test_a_companion_that_is_unknown_or_too_far_back_is_not_offered(push):
    cells = [Cell("w", number) for number in range(COMPANION_REACH + 1)]
    plans = [Planned(cell, chunk_id(bytes([cell.number]))) for cell in cells]
    *_, last = plan(push, *plans, Planned(CELLS["short"], IDS["short"], cells[0]))
    assert last.companion is None
    assert plan(push, Planned(Cell("x", 0), chunk_id(b"x"), Cell("never", 0)))[0].companion is None


def test_a_blob_that_nobody_asked_for_is_refused(push):
    assert refused(push, FULL["master"]) == "unplanned_blob"


def test_a_delta_against_what_was_not_offered_is_refused(push):
    plan(push, Planned(CELLS["master"], IDS["master"]), Planned(CELLS["short"], IDS["short"]))
    assert refused(push, FULL["master"], CAST) == "wrong_base"


def test_a_delta_that_comes_before_its_companion_is_refused(push):
    plan(push, Planned(CELLS["master"], IDS["master"]), Planned(CELLS["short"], IDS["short"], CELLS["master"]))
    assert refused(push, CAST, FULL["master"]) == "wrong_base"


def test_a_delta_of_a_companion_that_leans_on_one_itself_is_refused(push):
    wide = SHORT.astype("float32")
    plan(
        push,
        Planned(CELLS["master"], IDS["master"]),
        Planned(CELLS["short"], IDS["short"], CELLS["master"]),
        Planned(Cell("wide", 0), chunk_id(wide.tobytes()), CELLS["short"]),
    )
    third = Blob(chunk_id(wide.tobytes()), Encoding.CAST, 4, wide.nbytes, b"\x02", IDS["short"])
    assert refused(push, FULL["master"], CAST, third) == "wrong_base"


def test_a_blob_of_other_bytes_is_refused_unless_its_chunk_can_be_read_again(push):
    plan(push, Planned(CELLS["master"], IDS["master"]), Planned(CELLS["short"], IDS["short"], CELLS["master"]))
    lie = Blob(IDS["short"], Encoding.CAST, 2, SHORT.nbytes, b"\x01", IDS["master"])
    assert refused(push, FULL["master"], lie) == "wrong_blob"
    assert refused(push, replace(lie, read=lambda: bytes(SHORT.nbytes))) == "wrong_blob"
    push.write([replace(lie, read=SHORT.tobytes)])


def test_a_blob_may_be_given_twice(push):
    plan(push, Planned(CELLS["master"], IDS["master"]), Planned(CELLS["short"], IDS["short"], CELLS["master"]))
    push.write([FULL["master"], FULL["master"], CAST, FULL["short"]])
    push.write([CAST])


def test_a_base_that_was_not_offered_has_no_bytes(push):
    (missing,) = plan(push, Planned(CELLS["master"], IDS["master"]))
    with pytest.raises(InvalidInputError) as error:
        push.base(missing)
    assert error.value.kind == "no_base"


def test_what_a_cast_is_encoded_as_is_what_these_tests_write_by_hand():
    assert encode(SHORT.tobytes(), width=2, floating=True, base=MASTER.tobytes()) == (Encoding.CAST, b"\x00")
