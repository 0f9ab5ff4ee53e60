"""Hugging Face transformers: what a Trainer saves becomes a version, byte for byte.

    from lamella.transformers import LamellaCallback

    Trainer(model, args, train_dataset=data, callbacks=[LamellaCallback("weights", "bert@main")]).train()

This module imports transformers; ``import lamella`` does not.
"""

import logging
import math
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lamella.places import Place
from lamella_engine.content_store.revisions import parse_target
from lamella_engine.errors import InvalidInputError, LamellaError
from lamella_engine.repository import Repository
from lamella_engine.versions import Version

_LOG = logging.getLogger("lamella")

# What Trainer and accelerate pickle: optimizer.pt, scheduler.pt, scaler.pt, rng_state*.pth, training_args.bin.
_PICKLED = frozenset({".bin", ".pt", ".pth"})

# How fast the machine was is no property of a model.
_TIMINGS = ("_runtime", "_per_second")


class LamellaCallback(TrainerCallback):
    """Pushes each checkpoint directory that a Trainer has written, from the process that writes it.

    A version has the message ``step N``, and as metrics ``step`` and the numbers that Trainer logged at that very step:
    ``loss`` if ``save_steps`` is a multiple of ``logging_steps``, ``eval_loss`` and others if it evaluated before.

    Parameters
    ----------
    repo
        A repository, or its location, as :func:`lamella.open` takes it.
    target
        ``"model@branch"``.
    pickles
        Whether to keep, unopened, what Trainer pickles too: the states of optimizer, scheduler and random generators,
        and its arguments. ``trainer.train(resume_from_checkpoint=...)`` of a checkout goes on exactly only with them.
        They take about twice what the weights do, at each save, for no difference can be made of a pickle. (Other
        processes may still write theirs, ``rng_state_1.pth`` and so on, when this one pushes.)
    on_failure
        What a push that fails does: ``"log"`` tells it to the logger ``lamella`` and goes on; ``"raise_at_end"`` does
        so, and raises the first error when training has ended; ``"raise"`` raises it at once. A target that is
        malformed or a repository that is not there is an error before training begins, whatever is chosen.
    recipe
        As :meth:`Repository.push <lamella.Repository.push>` takes it.
    """

    def __init__(
        self,
        repo: Repository | str,
        target: str,
        *,
        pickles: bool = False,
        on_failure: Literal["log", "raise_at_end", "raise"] = "log",
        recipe: Any = None,
    ) -> None:
        parse_target(target)
        if on_failure not in ("log", "raise_at_end", "raise"):
            raise InvalidInputError(
                f"on_failure is 'log', 'raise_at_end' or 'raise', not {on_failure!r}", kind="bad_option"
            )
        self._place = Place(repo)
        self._target = target
        self._pickles = pickles
        self._on_failure = on_failure
        self._recipe = recipe
        self.version: Version | None = None
        """What the last push that succeeded made."""
        self.failures: dict[int, Exception] = {}
        """Why checkpoints of this training were not pushed, by step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the repository, before anything is trained in vain."""
        self.failures = {}
        if state.is_world_process_zero:
            self._place.open()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Push the checkpoint that Trainer has just written."""
        if not state.is_world_process_zero:
            return
        directory = Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        try:
            self.version = self._pushed(directory, state)
        except Exception as error:  # whatever it is, hours of training are worth more
            if self._on_failure == "raise":
                raise
            self.failures[state.global_step] = error
            unexpected = not isinstance(error, LamellaError)
            _LOG.error("%s was not pushed, its files stay there: %s", directory, error, exc_info=unexpected)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise what was put off."""
        if self._on_failure == "raise_at_end":
            for error in self.failures.values():
                raise error

    def _pushed(self, directory: Path, state: TrainerState) -> Version:
        with TemporaryDirectory(prefix="lamella-") as chosen:
            files = [file for file in directory.rglob("*") if file.is_file() and self._keeps(file)]
            if not any(file.suffix == ".safetensors" for file in files):
                raise InvalidInputError(
                    f"{directory} holds no weights in safetensors: push by hand what this Trainer writes",
                    kind="no_weights",
                )
            for file in files:
                link = Path(chosen, file.relative_to(directory))
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(os.path.abspath(file))
            return self._place.open().push(
                chosen,
                self._target,
                message=f"step {state.global_step}",
                metrics=_metrics(state),
                recipe=self._recipe,
            )

    def _keeps(self, file: Path) -> bool:
        return self._pickles or file.suffix not in _PICKLED


def _metrics(state: TrainerState) -> dict[str, float]:
    """Return the numbers that were logged at the step of the checkpoint."""
    logged = [entry for entry in state.log_history if entry.get("step") == state.global_step]
    found = {name: value for entry in logged for name, value in entry.items() if not name.endswith(_TIMINGS)}
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}
    return numbers | {"step": state.global_step}
