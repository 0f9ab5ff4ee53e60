"""The picture of a history: each version once, above its parents, joined to them and to nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamella.cli.graph import Node, draw, newest_first


def picture(*history, most=None):
    """Draw versions given as ``"child: parent parent"``; each line ends with the version that it is for."""
    pairs = [(line.partition(":")[0], line.partition(":")[2].split()) for line in history[:most]]
    return [drawing if id is None else f"{drawing} {id}" for drawing, id in draw(pairs)]


def test_one_line_of_descent_is_one_column():
    assert picture("3: 2", "2: 1", "1:") == ["* 3", "* 2", "* 1"]


def test_a_fork_joins_above_the_version_that_both_come_from():
    assert picture("4: 2", "3: 2", "2: 1", "1:") == [
        "* 4",
        "| * 3",
        "|/",
        "* 2",
        "* 1",
    ]


def test_three_heads_join_from_the_right():
    assert picture("4: 1", "3: 1", "2: 1", "1:") == [
        "* 4",
        "| * 3",
        "|/",
        "| * 2",
        "|/",
        "* 1",
    ]


def test_a_join_crosses_the_columns_between():
    assert picture("6: 1", "5: 2", "4: 3", "3: 1", "2: 1", "1:") == [
        "* 6",
        "| * 5",
        "| | * 4",
        "| | * 3",
        "| |/",
        "|/|",
        "| * 2",
        "|/",
        "* 1",
    ]


def test_columns_to_the_right_of_a_join_move_up():
    assert picture("6: 3", "5: 3", "4: 1", "3: 2", "2: 1", "1:") == [
        "* 6",
        "| * 5",
        "|/",
        "| * 4",
        "* | 3",
        "* | 2",
        "|/",
        "* 1",
    ]
    assert picture("7: 4", "6: 5", "5: 4", "4: 1", "3: 1", "1:")[:4] == ["* 7", "| * 6", "| * 5", "|/"]
    assert picture("9: 2", "8: 7", "6: 1", "7: 2", "2: 1", "1:") == [
        "* 9",
        "| * 8",
        "| | * 6",
        "| * | 7",
        "|/ /",
        "* | 2",
        "|/",
        "* 1",
    ]


def test_a_version_with_two_parents_opens_a_column_and_the_lines_meet_again():
    assert picture("5: 4 3", "4: 2", "3: 2", "2: 1", "1:") == [
        "* 5",
        "|\\",
        "* | 4",
        "| * 3",
        "|/",
        "* 2",
        "* 1",
    ]


def test_a_second_parent_that_has_a_column_already_is_joined_to_it():
    assert picture("4: 3", "2: 1 3", "3: 1", "1:") == [
        "* 4",
        "| * 2",
        "| |\\",
        "| |/",
        "|/|",
        "* | 3",
        "|/",
        "* 1",
    ]


def test_an_end_is_not_taken_for_a_child_of_what_is_below_it():
    assert picture("2:", "1:") == ["* 2", "", "* 1"]
    assert picture("3: 2", "1:", "0:", "2:") == ["* 3", "| * 1", "|", "| * 0", "* 2"]
    assert picture("4:", "3: 2", "2:") == ["* 4", "", "* 3", "* 2"]


def test_what_is_right_of_an_end_moves_up():
    assert picture("5: 4", "3: 2", "4:", "2: 1", "1:") == ["* 5", "| * 3", "* | 4", " /", "* 2", "* 1"]


def test_a_history_may_be_cut_anywhere():
    history = ("6: 1", "5: 2", "4: 3", "3: 1", "2: 1", "1:")
    for most in range(len(history) + 1):
        cut = picture(*history, most=most)
        assert cut == picture(*history)[: len(cut)]
        assert sum("*" in line for line in cut) == most


def test_versions_come_by_falling_number_each_before_its_parents():
    history = {
        "a3": Node("a", 3, ["b9"]),
        "a2": Node("a", 2, ["b9", "a1"]),
        "a1": Node("a", 1, []),
        "b9": Node("b", 9, ["gone"]),
    }
    assert list(newest_first(history)) == ["a3", "a2", "b9", "a1"]


@st.composite
def histories(draw_from):
    """Versions of one model, each with up to three earlier ones as parents."""
    history = {}
    for number in range(1, draw_from(st.integers(0, 12)) + 1):
        parents = draw_from(st.lists(st.sampled_from(sorted(history)), unique=True, max_size=3)) if history else []
        history[f"{number:02}"] = Node("m", number, parents)
    return history


@given(histories())
def test_every_line_of_a_picture_leads_from_a_version_to_its_parents(history):
    order = list(newest_first(history))
    assert order == sorted(history, reverse=True)
    lines = list(draw((id, history[id].parents) for id in order))
    assert [id for _, id in lines if id is not None] == order
    assert {(child, parent) for child in history for parent in history[child].parents} == _followed(lines)


def _followed(lines):
    """Return who leads to whom, by following the marks down the page as a reader would."""
    found = set()
    upright: dict[int, set[str]] = {}  # who comes down to a place, straight
    slanted: dict[int, set[str]] = {}  # and who along a slash, which crosses a column if another slash goes on
    for drawing, id in lines:
        marks = dict(enumerate(drawing))
        straight: dict[int, set[str]] = {}
        aslant: dict[int, set[str]] = {}
        for place, mark in marks.items():
            here = upright.get(place, set()) | (slanted.get(place, set()) if marks.get(place - 1) != "/" else set())
            if mark == "*":
                found |= {(child, id) for child in here}
                straight[place] = {id}
            elif mark == "|":
                straight[place] = here
            elif mark == "/":
                moved = upright.get(place + 1, set()) if marks.get(place + 1) != "|" else set()
                aslant[place - 1] = moved | slanted.get(place + 1, set())
            elif mark == "\\":
                aslant[place + 1] = upright.get(place - 1, set()) | slanted.get(place - 1, set())
        upright, slanted = straight, aslant
    return found


@pytest.mark.parametrize("history", [(), ("1:",)])
def test_the_smallest_histories(history):
    assert len(picture(*history)) == len(history)
