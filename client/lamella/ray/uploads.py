"""Ray Train: checkpoints that are reported go into a repository."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lamella.places import Place
from lamella_engine.content_store.revisions import parse_target


class LamellaUpload:
    """The ``checkpoint_upload_fn`` of ``ray.train.report``: pushes what is reported, and leaves a note in its place.

    The directory that a worker reports becomes a version, its safetensors files as tensors and all others as files; the
    message is the name that Ray gives the checkpoint. In the storage of the run there is only ``lamella-<rank>.json``,
    which names ``repository`` and ``revision``. What the push raises, the report does.

    Parameters
    ----------
    repo
        Where the repository is, as :func:`lamella.open` takes it, for every worker.
    target
        ``"model@branch"``; with ``{rank}`` in it, such as ``"llm@rank-{rank}"``, each worker has a branch of its own.
        Without it only one of them may report a checkpoint at a time.

    Raises
    ------
    InvalidInputError
        The target is none.
    """

    def __init__(self, repo: str, target: str) -> None:
        parse_target(target.format(rank=0))
        self._repo = repo
        self._place = Place(repo)
        self._target = target

    def __call__(self, checkpoint: Any, checkpoint_dir_name: str) -> Any:
        """Return the checkpoint that holds the note. Called by Ray Train."""
        from ray import train  # on use: it needs pyarrow, which ray does not

        context = train.get_context()
        rank = context.get_world_rank()
        with checkpoint.as_directory() as directory:
            target = self._target.format(rank=rank)
            version = self._place.open().push(directory, target, message=checkpoint_dir_name)
        with TemporaryDirectory(prefix="lamella-") as directory:
            note = json.dumps({"repository": self._repo, "revision": version.id})
            Path(directory, f"lamella-{rank}.json").write_text(note)
            notes = train.Checkpoint.from_directory(directory)
            return context.get_storage().persist_current_checkpoint(notes, checkpoint_dir_name)
