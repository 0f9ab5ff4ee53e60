r"""A history as a picture: a column for each line of descent, in ASCII, the newest version on top.

    * v5 (main)
    | * v4 (trial)
    |/
    * v3

``*`` is a version, ``|`` leads from a version down to its parent. Where two lines come from one version, the right one
ends in ``/``; where a version has several parents, each further one starts to its right with ``\``.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from typing import NamedTuple


class Node(NamedTuple):
    """A version, as far as its place in a history goes."""

    model: str
    number: int
    """Its number in its model: a child's is greater than its parent's, if they are of one model."""
    parents: Sequence[str]
    """Ids; the first one continues the version's own column. One that is not in the history is left out."""


def newest_first(history: Mapping[str, Node]) -> Iterator[str]:
    """Yield the ids of a history, each before its parents, by falling number where that leaves a choice."""
    children = Counter(parent for node in history.values() for parent in node.parents)
    free: list[tuple[int, str, str]] = []

    def release(id: str) -> None:
        heappush(free, (-history[id].number, history[id].model, id))

    for id in history:
        if not children[id]:
            release(id)
    while free:
        _, _, id = heappop(free)
        yield id
        for parent in history[id].parents:
            children[parent] -= 1
            if not children[parent] and parent in history:
                release(parent)


def draw(history: Iterable[tuple[str, Sequence[str]]]) -> Iterator[tuple[str, str | None]]:
    """Yield the lines of the picture from top to bottom.

    Parameters
    ----------
    history
        Ids with the ids of their parents, each before its parents. It may be cut short anywhere.

    Yields
    ------
    tuple
        What stands at the left of a line, and the id of the version that the line is for; None if it only joins
        columns.
    """
    columns: list[str] = []  # the version that each of them leads down to
    joints: list[str] = []  # drawn only if something follows
    ended: int | None = None  # the column of the version above, if that had no parents
    for id, parents in history:
        if id not in columns:
            if ended == len(columns):  # directly below, it would look like the parent of the version above
                joints.append(_row(len(columns)))
            columns.append(id)
        at = columns.index(id)
        for joint in joints:
            yield joint, None
        yield " ".join("*" if column == at else "|" for column in range(len(columns))), id
        ended = None if parents else at
        joints = [*_replace(columns, at, parents), *_join_equal(columns)]


def _replace(columns: list[str], at: int, parents: Sequence[str]) -> Iterator[str]:
    """Let the version in column ``at`` be followed by its parents; yield what that looks like."""
    if not parents:
        del columns[at]
        if at < len(columns):
            yield _row(at, "/", left_of=range(at + 1, len(columns) + 1))
        return
    columns[at] = parents[0]
    for place, parent in enumerate(parents[1:], at + 1):
        columns.insert(place, parent)
        yield _row(place, "\\", left_of=range(place, len(columns)))


def _join_equal(columns: list[str]) -> Iterator[str]:
    """Let columns that lead to one version become the leftmost of them; yield what that looks like."""
    for column in reversed(range(len(columns))):
        into = columns.index(columns[column])
        if into < column:
            yield _row(column, "/", left_of=range(column, len(columns)))
            del columns[column]
            for crossed in range(column - 1, into, -1):
                yield _row(len(columns), "/", left_of=[crossed])


def _row(bars: int, slash: str = "", *, left_of: Iterable[int] = ()) -> str:
    """Return a line with ``|`` in the first columns, and ``slash`` in the gaps to the left of others."""
    marks = {2 * column: "|" for column in range(bars)} | {2 * column - 1: slash for column in left_of}
    return "".join(marks.get(place, " ") for place in range(max(marks, default=-1) + 1))
