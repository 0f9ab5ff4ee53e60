"""Pushes that go on behind their caller: one at a time, in the order in which they were asked for."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass

from lamella_engine.checkpoints import Checkpoint, MemoryCheckpoint
from lamella_engine.checkpoints.staging import Staging
from lamella_engine.errors import InvalidInputError
from lamella_engine.versions import Version

logger = logging.getLogger("lamella")


@dataclass(frozen=True, slots=True, eq=False)
class PushHandle:
    """A push that goes on by itself; made by ``push(..., wait=False)``.

    Its futures are those of :mod:`concurrent.futures`: ``result(timeout)``, ``exception(timeout)``, ``done()``. As long
    as the push has not begun, ``published.cancel()`` takes it back.
    """

    __module__ = "lamella"

    staged: Future[None]
    """Done as soon as the tensors may change: at once for those in the CPU's memory, for those on a GPU when copies of
    them have arrived. Raises InvalidInputError (``source_changed``) if they changed before."""
    published: Future[Version]
    """Done when the version is recorded: gives what :meth:`lamella.Repository.push` returns, or raises."""


class Background:
    """The pushes of one repository that nobody waits for, and the memory that their tensors are copied into.

    A thread runs while there are any, and not as a daemon: a program ends after its pushes.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._failed: list[_Job] = []
        self._closed = False
        self._staging = Staging()

    def _settle_in(self) -> None:
        """Begin anew in a fork, which has the pushes and perhaps a lock that is taken, but not the thread."""
        if self._process != os.getpid():
            self._begin()

    def start(
        self, model: str, branch: str, checkpoint: Checkpoint, record: Callable[[Checkpoint], Version]
    ) -> PushHandle:
        """Have a checkpoint recorded after all that were started before; tensors in memory are copied first.

        Waits for room if other copies have not been stored yet.

        Parameters
        ----------
        checkpoint
            Is closed in the end.
        record
            Makes a version of what it is given, in another thread.

        Raises
        ------
        InvalidInputError
            A tensor changed while it was copied (``source_changed``), or the repository was closed (``closed``).
        LimitError
            See :meth:`Staging.copy`.
        """
        self._settle_in()
        with ExitStack() as opened:
            opened.enter_context(checkpoint)
            if self._closed:
                raise InvalidInputError("this repository was closed: open it again", kind="closed")
            staged: Future[None] = Future()
            staged.set_running_or_notify_cancel()  # so that nobody can cancel it
            if isinstance(checkpoint, MemoryCheckpoint):
                checkpoint = copied = opened.enter_context(self._staging.copy(checkpoint))
                if copied.whole:
                    staged.set_result(None)
                else:
                    threading.Thread(target=_tell, args=(staged, copied.wait), name="lamella-staging").start()
            else:
                staged.set_result(None)
            job = _Job((model, branch), _Published(), checkpoint, record)
            with self._changed:
                if not self._jobs:
                    threading.Thread(target=self._run, name="lamella-push").start()  # waits for this lock
                self._jobs.append(job)
            job.published.add_done_callback(lambda _: job.checkpoint.close())
            opened.pop_all()
        return PushHandle(staged, job.published)

    def _run(self) -> None:
        while True:
            with self._changed:
                job = self._jobs[0]
            job.run()
            with self._changed:
                self._jobs.popleft()
                self._failed = [one for one in (*self._failed, job) if one.published.unseen is not None]
                self._changed.notify_all()
                if not self._jobs:
                    return

    def settle(self, model: str, branch: str) -> None:
        """Wait for the pushes to a branch; then as :meth:`raise_failure`."""
        self._settle_in()
        with self._changed:
            self._changed.wait_for(lambda: all(job.target != (model, branch) for job in self._jobs))
        self.raise_failure(model, branch)

    def raise_failure(self, model: str, branch: str) -> None:
        """Raise what a push to a branch failed with, if nobody has asked for it; each failure once."""
        self._settle_in()
        with self._changed:
            _raise_first(job for job in (*self._failed, *self._jobs) if job.target == (model, branch))

    def close(self) -> None:
        """Wait for all pushes, and give their memory back; then as :meth:`raise_failure` for any branch."""
        self._settle_in()
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)
            self._closed = True
            self._staging.close()
            _raise_first(self._failed)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    target: tuple[str, str]
    published: "_Published"
    checkpoint: Checkpoint
    record: Callable[[Checkpoint], Version]

    def run(self) -> None:
        """Push, unless it was cancelled."""
        if not self.published.set_running_or_notify_cancel():
            return
        try:
            with self.checkpoint:
                version = self.record(self.checkpoint)
        except BaseException as error:
            logger.exception("a push to %s@%s with wait=False failed", *self.target)
            self.published.set_exception(error)
        else:
            self.published.set_result(version)


def _tell(future: Future[None], function: Callable[[], None]) -> None:
    """Have a future say how a function ends."""
    try:
        function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)


def _raise_first(jobs: Iterable[_Job]) -> None:
    for job in jobs:
        error = job.published.unseen
        if error is not None:
            job.published.seen = True
            error.add_note("It is a push to {}@{} with wait=False that failed, before this call.".format(*job.target))
            raise error


class _Published(Future[Version]):
    """A future that knows whether anybody has learnt how it ended."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False
        self._process = os.getpid()

    @property
    def unseen(self) -> BaseException | None:
        """The error that it ended with, if nobody has asked for it."""
        return None if self.seen or self.cancelled() or not self.done() else super().exception()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if self._process != os.getpid() and not self.done():
            raise InvalidInputError(
                "this push is one of the process that this one was forked from: ask there", kind="forked"
            )
        error = super().exception(timeout)
        self.seen = True
        return error

    def result(self, timeout: float | None = None) -> Version:
        self.exception(timeout)
        return super().result(timeout)
