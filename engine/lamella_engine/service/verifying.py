"""Decoding, in the background, what clients have put into the bucket by themselves: see ``content_store.incoming``."""

import logging
import threading
from contextlib import closing
from weakref import WeakKeyDictionary

from lamella_engine.content_store.incoming import sweep
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.errors import LamellaError
from lamella_engine.maintenance import Verification, verifying

logger = logging.getLogger("lamella.service")

PRINCIPAL = "verifier"
"""Who acts where the log says that packs are right."""


class Verifier:
    """Looks at repositories, one after another, for packs that nobody but their writers has decoded.

    Each blob is checked as ``verify --deep`` checks it, in the server's threads, and packs that are right may serve any
    push from then on. One that is not stays as it is: the version that stands on it fails ``verify``, no other does.
    What was put and never asked for is deleted after a week.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[PackedStore] = []
        self._wrong: WeakKeyDictionary[PackedStore, set[str]] = WeakKeyDictionary()
        """For each repository that was looked at, the packs that are not right: they are not read again and again."""
        self._working = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="lamella-verifier", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def look_at(self, store: PackedStore) -> None:
        """Have a repository looked at, soon, if it is not about to be."""
        with self._changed:
            self._wrong.setdefault(store, set())
            if store not in self._waiting:
                self._waiting.append(store)
                self._changed.notify_all()

    def look_once(self, store: PackedStore) -> None:
        """Have a repository looked at that this process has not seen before: another one may have left something."""
        if store not in self._wrong:
            self.look_at(store)

    def _run(self) -> None:
        while (store := self._next()) is not None:
            try:
                self._verify(store)
            except LamellaError as error:  # whoever pushes there next has it looked at again
                logger.warning("doubtful packs are not verified: %s", error)
            except Exception:  # a bug: other repositories are looked at all the same
                logger.exception("doubtful packs are not verified")

    def _next(self) -> PackedStore | None:
        with self._changed:
            self._working = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or self._waiting)
            if self._stopped:
                return None
            self._working = True
            return self._waiting.pop(0)

    def _verify(self, store: PackedStore) -> None:
        sweep(store.objects)
        report = Verification(deep=True)
        wrong = self._wrong[store]
        with closing(verifying(store, report, doubtful=True, known=wrong, by=PRINCIPAL)) as steps:
            for _ in steps:
                if self._stopped:
                    return
        wrong.update(problem.where for problem in report.problems)
        for problem in report.problems:
            logger.error("%s stays doubtful: %s", problem.where, problem.message)

    def wait(self, timeout_s: float) -> bool:
        """Return whether, within so long, everything has been looked at that was to be."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._working), timeout_s)

    def stop(self) -> None:
        """End, some hundred blobs later at most: another server looks at what is left, or ``verify``. Idempotent."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
