"""Lightning: a trainer's checkpoints are versions instead of files, whole or not at all, with nothing pickled.

    from lamella.lightning import LamellaCheckpointIO

    trainer = Trainer(plugins=[LamellaCheckpointIO("weights", "bert@run-7")], callbacks=[ModelCheckpoint(...)])
    trainer.fit(model, ckpt_path="bert@run-7")        # any revision; or a path that ModelCheckpoint has named

A path of Lightning, ``.../epoch=0-step=2000.ckpt``, names no file here: each save is a new version of the branch, and
its file's name becomes an alias below the branch, ``bert@run-7/epoch-0-step-2000``. What stands for a checkpoint that
ModelCheckpoint would keep can thus be listed; the rest is in the history.

Works with ``lightning`` and with ``pytorch_lightning``. ``import lamella`` imports neither.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection

import lamella.torch
from lamella.places import Place
from lamella_engine.content_store.revisions import parse_target
from lamella_engine.errors import InvalidInputError, RefNotFoundError
from lamella_engine.repository import Repository

_SUFFIX = ".ckpt"
_COUNTERS = {"epoch": "epoch", "step": "global_step"}

# What a ref's name may not have: it keeps dots that stand between letters or digits.
_NO_REF = re.compile(r"[^A-Za-z0-9._-]+|(?<![A-Za-z0-9])\.|\.(?![A-Za-z0-9])")


class LamellaCheckpointIO(CheckpointIO):
    """Saves the checkpoints of a Lightning trainer as versions of one branch, and loads any version.

    Whatever is tensors, numbers, text, lists and dicts is kept: weights, optimizers, schedulers, loops, callbacks,
    hyper-parameters. What only a pickle could hold is refused by its name at the first save. A version's metrics are
    ``epoch``, ``step``, and what ModelCheckpoint monitors if this checkpoint is one that it ranks.

    Parameters
    ----------
    repo
        A repository, or its location, as :func:`lamella.open` takes it, which strategies that spawn processes need.
    target
        ``"model@branch"``. To go on from an older version, begin a branch there, as by ``repo.branch("a@b", "a@v3")``.
    recipe
        As :meth:`Repository.push <lamella.Repository.push>` takes it.

    Works as it is, and in AsyncCheckpointIO. Strategies that write shards (FSDP2 and other model-parallel ones) go past
    a CheckpointIO: see :class:`lamella.torch.LamellaWriter`. So does ``LightningModule.load_from_checkpoint``, which
    reads files: give ``load_state_dict`` what ``lamella.torch.state(repo, revision)["state_dict"]`` returns. Nor does
    ``ckpt_path="last"`` find what is no file: give the branch. Two ModelCheckpoints need different file names.
    """

    def __init__(self, repo: Repository | str, target: str, *, recipe: Any = None) -> None:
        parse_target(target)
        self._place = Place(repo)
        self._target = target
        self._recipe = recipe

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Push a checkpoint to the branch, then let the alias of its path stand at the new version.

        Raises
        ------
        InvalidInputError
            It holds what is no typed data (``not_storable``), or there are ``storage_options`` (``bad_option``).
        ConflictError
            Somebody else has pushed to the branch meanwhile.
        """
        if storage_options is not None:
            raise InvalidInputError("a repository takes no storage_options: leave them out", kind="bad_option")
        alias = self.alias(path)
        parse_target(alias)  # refused now, not after the upload
        # Processes that were spawned hand their weights back in such a file: no checkpoint that the branch should hold.
        hidden = Path(path).name.startswith(".")
        counts = {name: checkpoint[key] for name, key in _COUNTERS.items() if key in checkpoint}
        repo = self._place.open()
        try:
            version = lamella.torch.push(
                checkpoint,
                repo,
                alias if hidden else self._target,
                message=f"step {counts['step']}" if "step" in counts else "",
                metrics=counts | dict(_scores(checkpoint, str(path))),
                recipe=self._recipe,
            )
        except InvalidInputError as error:
            section, _, name = error.context.get("path", "").partition(".")
            if error.kind != "not_storable" or section != "hyper_parameters":
                raise
            advice = f"leave it out with save_hyperparameters(ignore=[{name.partition('.')[0]!r}])"
            raise InvalidInputError(f"{error.message}; or {advice}", kind=error.kind, **error.context) from None
        if not hidden:
            repo.alias(alias, version.id)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return a checkpoint as it was saved.

        Parameters
        ----------
        path
            One that was saved to, or a revision, such as ``"bert@run-7~1"`` or ``"bert@best:val_acc"``.
        map_location
            A device for all tensors; the CPU by default.
        weights_only
            Makes no difference: loading runs no code.

        Raises
        ------
        RefNotFoundError
            Nothing was saved to that path, or it was removed.
        InvalidInputError
            ``map_location`` is a dict or a function (``bad_option``): where tensors once were is not known.
        """
        if not (map_location is None or isinstance(map_location, str | torch.device)):
            raise InvalidInputError("tensors go to one device: give it as map_location", kind="bad_option")
        name = os.fspath(path)
        is_revision = "@" in name and not os.path.isabs(name) and not name.endswith(_SUFFIX)
        found = lamella.torch.state(self._place.open(), name if is_revision else self.alias(path))
        if map_location is not None:
            found = apply_to_collection(found, torch.Tensor, lambda tensor: tensor.to(map_location))
        return dict(found)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the alias of a path. The version stays: in the log, loadable, and as a base of what follows it.

        AsyncCheckpointIO removes at once what it may not have saved yet: then the alias stays, and does no harm.
        """
        with suppress(RefNotFoundError):
            self._place.open().delete_ref(self.alias(path))

    def alias(self, path: str | os.PathLike[str]) -> str:
        """Return the alias of a path: its file's name below the branch, with ``-`` for what no ref may have."""
        stem = Path(path).name.removesuffix(_SUFFIX)
        return f"{self._target}/{_NO_REF.sub('-', stem)}"


# The package `lightning` has a twin of each class of `pytorch_lightning`, which it brings along, and asks for its own.
with suppress(ModuleNotFoundError):
    from lightning.fabric.plugins import CheckpointIO as _Twin

    _Twin.register(LamellaCheckpointIO)


def _scores(checkpoint: Mapping[str, Any], path: str) -> Iterator[tuple[str, float]]:
    """Yield what each ModelCheckpoint monitors, from those that rank the checkpoint at ``path``."""
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, Mapping) and state.get("monitor") and path in state.get("best_k_models", ()):
            score = float(state["best_k_models"][path])
            if math.isfinite(score):
                yield state["monitor"], score
