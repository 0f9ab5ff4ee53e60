"""Checkpoints to measure on: a family of real fine-tunes of all-MiniLM-L6-v2, the same for the same seed.

    base --> main-1 --> main-2 --> main-3     every weight trained, saved every ``steps`` steps of one run
      \\--> frozen-1                            embeddings and all but the last two encoder layers frozen

Each is saved as float32 and as bfloat16, the way mixed-precision training does: one run over float32 weights, rounded
when it is saved. A family is made once and then found again on disk.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from benchmarks import minilm

DATA = Path(__file__).parent / "data"
"""Where families are kept between runs; git ignores it."""

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")

STEPS = 40
"""Steps between two checkpoints: enough to move every weight, and the whole family takes about a minute on 2 cores."""

_BATCH = 16  # pairs; each is told from the 15 others
_LEARNING_RATE = 2e-5  # sentence-transformers' default
_WEIGHT_DECAY = 0.01  # AdamW's default; decays the embeddings of words that no sentence has, too
_SCALE = 20.0  # of cosines before the softmax, as the model was trained with
_TRAINED_LAYERS = 2  # of the frozen fine-tune, the last ones: MiniLM has six, so four are frozen


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved state of a family."""

    name: str
    branch: str
    parent: str | None
    """Name of the checkpoint whose weights it was trained from; None for the first."""
    steps: int
    """Optimizer steps since the base."""
    loss: float | None
    """Mean training loss since the checkpoint before; None for the base, which was not trained here."""
    folder: Path

    def path(self, precision: Precision) -> Path:
        """Return the ``.safetensors`` file that holds it."""
        return self.folder / f"{self.name}-{precision}.safetensors"

    def tensors(self, precision: Precision) -> dict[str, Tensor]:
        """Return its state dict, read anew."""
        return load_file(self.path(precision))


def minilm_family(
    data: Path = DATA, *, steps: int = STEPS, seed: int = 0, report: Callable[[str], None] = lambda _: None
) -> tuple[Checkpoint, ...]:
    """Return the family of the published model, fine-tuning it unless ``data`` already has it.

    Parameters
    ----------
    data
        A folder for families; made if it is missing.
    steps
        Optimizer steps between two checkpoints.
    seed
        Chooses which sentences are trained on, in which order.
    report
        Called with one line after each fine-tune.
    """
    return family(minilm.shipped(), data / f"minilm-{steps}-steps-seed-{seed}", steps=steps, seed=seed, report=report)


def family(
    base: Path, folder: Path, *, steps: int, seed: int, report: Callable[[str], None] = lambda _: None
) -> tuple[Checkpoint, ...]:
    """Return the family of the model in ``base``, kept in ``folder``: whole, or not there at all.

    Parameters
    ----------
    base
        A folder with ``model.safetensors`` (float32) and ``vocab.txt``.
    folder
        Read if it exists, else made.
    steps, seed, report
        As for :func:`minilm_family`.

    Returns
    -------
    tuple of Checkpoint
        Parents first.
    """
    index = "family.json"
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        unfinished.mkdir(parents=True)
        checkpoints = [asdict(checkpoint) for checkpoint in _make(base, unfinished, steps, seed, report)]
        (unfinished / index).write_text(json.dumps(checkpoints, default=str), encoding="utf-8")
        unfinished.rename(folder)
    rows = json.loads((folder / index).read_text(encoding="utf-8"))
    return tuple(Checkpoint(**{**row, "folder": folder}) for row in rows)


def _make(base: Path, folder: Path, steps: int, seed: int, report: Callable[[str], None]) -> Iterator[Checkpoint]:
    first = Checkpoint("base", "main", None, 0, None, folder)
    shutil.copyfile(base / "model.safetensors", first.path("float32"))
    weights = first.tensors("float32")
    _save(weights, first.path("bfloat16"), torch.bfloat16)
    yield first

    tokenizer = minilm.Tokenizer(base / "vocab.txt")
    last_layers = range(minilm.layers(weights))[-_TRAINED_LAYERS:]
    for branch, count, trained in (
        ("main", 3, ("",)),
        ("frozen", 1, tuple(f"encoder.layer.{number}." for number in last_layers)),
    ):
        weights = first.tensors("float32")
        losses = _train(weights, trained, tokenizer, seed=f"{branch} {seed}")
        parent = first
        for number in range(1, count + 1):
            loss = sum(next(losses) for _ in range(steps)) / steps
            checkpoint = Checkpoint(f"{branch}-{number}", branch, parent.name, number * steps, loss, folder)
            _save(weights, checkpoint.path("float32"), torch.float32)
            _save(weights, checkpoint.path("bfloat16"), torch.bfloat16)
            report(f"{parent.name} -> {checkpoint.name}: {steps} steps of AdamW, mean loss {loss:.3f}")
            yield checkpoint
            parent = checkpoint


def _train(
    weights: Mapping[str, Tensor], trained: tuple[str, ...], tokenizer: minilm.Tokenizer, *, seed: str
) -> Iterator[float]:
    """Train in place the weights whose names begin with one of ``trained``; yield the loss of each step."""
    parameters = [
        weight.requires_grad_()
        for name, weight in weights.items()
        if weight.is_floating_point() and name.startswith(trained)
    ]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    pairs = minilm.docstring_pairs()
    order = random.Random(seed)
    while True:
        names, summaries = zip(*order.sample(pairs, _BATCH), strict=True)
        cosines = minilm.embed(weights, *tokenizer(names)) @ minilm.embed(weights, *tokenizer(summaries)).T
        loss = functional.cross_entropy(_SCALE * cosines, torch.arange(_BATCH))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        yield loss.item()


def _save(weights: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    rounded = {
        name: weight.detach().to(dtype) if weight.is_floating_point() else weight for name, weight in weights.items()
    }
    save_file(rounded, path, metadata={"format": "pt"})
