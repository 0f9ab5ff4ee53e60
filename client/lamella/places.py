"""Repositories as callbacks, plugins and writers hold them: open, or by a location that outlives their process."""

import lamella
from lamella_engine.errors import InvalidInputError
from lamella_engine.repository import Repository


class Place:
    """A repository that is given as such, or by its location: then each process opens it when it needs it."""

    def __init__(self, repo: Repository | str) -> None:
        self._location = repo if isinstance(repo, str) else None
        self._repo = None if isinstance(repo, str) else repo

    def open(self) -> Repository:
        """Return the repository; the first call in a process opens it."""
        if self._repo is None:
            assert self._location is not None
            self._repo = lamella.open(self._location)
        return self._repo

    def __getstate__(self) -> str:
        if self._location is None:
            raise InvalidInputError(
                "an open repository cannot go to another process: give its location, as lamella.open takes it",
                kind="not_picklable",
            )
        return self._location

    def __setstate__(self, location: str) -> None:
        self._location, self._repo = location, None
