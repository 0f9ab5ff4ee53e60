"""Checkpoints to measure on, of real training: the same for the same seed, made once and then found again on disk.

A *family* is what a demo and whole repositories need, fine-tunes of all-MiniLM-L6-v2:

    base --> main-1 --> main-2 --> main-3     every weight trained, saved every ``steps`` steps of one run
      \\--> frozen-1                            embeddings and all but the last two encoder layers frozen

*Pairs* are what a codec is measured on: a checkpoint, and a stored one that it resembles. ``pairs`` has fine-tunes at
several learning rates, with and without weight decay, one continued and one frozen; a step of reinforcement learning;
a merged LoRA; a GPT trained from scratch, with the state of its optimizer; and two models that have nothing to do with
each other.

*Chains* are what bounds are chosen on: many checkpoints of one run, one after another.

Every precision is the same run over float32 weights, rounded when it is saved, as mixed-precision training does.

    python -m benchmarks.corpora [--seed N]     make the pairs of a seed, and list them
"""

import argparse
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import gpt, minilm

DATA = Path(__file__).parent / "data"
"""Where families are kept between runs; git ignores it."""

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")

STEPS = 40
"""Steps between two checkpoints: enough to move every weight, and the whole family takes about a minute on 2 cores."""

_LEARNING_RATE = 2e-5  # sentence-transformers' default
_WEIGHT_DECAY = 0.01  # AdamW's default; decays the embeddings of words that no sentence has, too
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

    def make(unfinished: Path) -> None:
        checkpoints = [asdict(checkpoint) for checkpoint in _make(base, unfinished, steps, seed, report)]
        (unfinished / index).write_text(json.dumps(checkpoints, default=str), encoding="utf-8")

    _keep(folder, make)
    rows = json.loads((folder / index).read_text(encoding="utf-8"))
    return tuple(Checkpoint(**{**row, "folder": folder}) for row in rows)


def _keep(folder: Path, make: Callable[[Path], None]) -> None:
    """Have ``folder`` made unless it is there: whole, or not at all."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)


def _make(base: Path, folder: Path, steps: int, seed: int, report: Callable[[str], None]) -> Iterator[Checkpoint]:
    first = Checkpoint("base", "main", None, 0, None, folder)
    shutil.copyfile(base / "model.safetensors", first.path("float32"))
    weights = first.tensors("float32")
    _save(weights, first.path("bfloat16"), torch.bfloat16)
    yield first

    last_layers = _last_layers(weights)
    for branch, count, trained in (("main", 3, ("",)), ("frozen", 1, last_layers)):
        weights = first.tensors("float32")
        loss_of_next = partial(minilm.Sentences(base, f"{branch} {seed}").contrast, weights)
        losses = _descend(_adamw(weights, trained), loss_of_next, repeat(_LEARNING_RATE))
        parent = first
        for number in range(1, count + 1):
            loss = sum(next(losses) for _ in range(steps)) / steps
            checkpoint = Checkpoint(f"{branch}-{number}", branch, parent.name, number * steps, loss, folder)
            _save(weights, checkpoint.path("float32"), torch.float32)
            _save(weights, checkpoint.path("bfloat16"), torch.bfloat16)
            report(f"{parent.name} -> {checkpoint.name}: {steps} steps of AdamW, mean loss {loss:.3f}")
            yield checkpoint
            parent = checkpoint


@dataclass(frozen=True, slots=True)
class Pair:
    """A checkpoint, and a stored one that it resembles."""

    name: str
    """What lies between the two."""
    dtype: str
    """Of every tensor but a few integers."""
    base: Path
    """A ``.safetensors`` file, of the same tensors as ``child``."""
    child: Path


@dataclass(frozen=True, slots=True)
class Chain:
    """Checkpoints of one run, each some steps after the one before."""

    name: str
    paths: tuple[Path, ...]
    """``.safetensors`` files in float32, oldest first."""


LARGE, SMALL = gpt.Shape(layers=6, width=384), gpt.Shape(layers=5, width=320)

TUNING_STEPS = 50
"""Steps of a fine-tune; at 2e-5 they change a quarter of its bfloat16 values."""

PRETRAINING_STEPS = 400
"""Steps that a GPT's learning rate is planned for; a checkpoint comes every tenth of them."""

CHAIN_LENGTH = 33
"""Checkpoints of a chain: the longest that the format allows, 31 deltas on a full one, and the beginning of another."""

_CHAINED_STEPS = 8 * CHAIN_LENGTH  # of a fine-tune; of a GPT, all that it is trained: every 12th

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pairs(
    data: Path = DATA,
    *,
    seed: int = 0,
    wanted: Callable[[str], bool] = lambda _: True,
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[Pair]:
    """Yield the pairs of a seed, each as soon as ``data`` has it. All are made in half an hour on a core, in 5 GB.

    Seed 0 is for development, with the ``LARGE`` GPT; others are for judging, with the ``SMALL`` one.

    Parameters
    ----------
    data
        A folder for checkpoints; made if it is missing.
    seed
        Chooses sentences and text, and the initial weights of what does not start from a published model.
    wanted
        Told a pair's name and dtype ("frozen float16"); the others are neither yielded nor made.
    report
        Called with one line now and then while something is made.
    """
    runs = FineTunes(minilm.shipped(), data, steps=TUNING_STEPS, seed=seed, wanted=wanted, report=report)
    yield from runs.pairs()
    shape = SMALL if seed else LARGE
    yield from Pretrainings(shape, data, steps=PRETRAINING_STEPS, seed=seed, wanted=wanted, report=report).pairs()


def chains(
    data: Path = DATA,
    *,
    seed: int = 0,
    wanted: Callable[[str], bool] = lambda _: True,
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[Chain]:
    """Yield a fine-tune of MiniLM and the training of a ``SMALL`` GPT, in 4 GB; arguments as for ``pairs``."""
    if wanted(name := "fine-tune"):
        tunes = FineTunes(minilm.shipped(), data, steps=_CHAINED_STEPS, seed=seed, report=report)
        yield Chain(name, tunes.chain(CHAIN_LENGTH))
    if wanted(name := "gpt"):
        trainings = Pretrainings(SMALL, data, steps=PRETRAINING_STEPS, seed=seed, report=report)
        yield Chain(name, trainings.chain(CHAIN_LENGTH))


class _Runs:
    """Runs of training with one seed; each leaves folders with a file a dtype, made once."""

    def __init__(
        self,
        data: Path,
        *,
        steps: int,
        seed: int,
        wanted: Callable[[str], bool] = lambda _: True,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._data = data
        self._steps = steps
        self._seed = seed
        self._wanted = wanted
        self._report = report

    def _pairs(
        self,
        name: str,
        dtypes: Iterable[str],
        base: Callable[[], Path],
        child: Callable[[], Path],
        *,
        file: str | None = None,
    ) -> Iterator[Pair]:
        """Yield the pair in each dtype that is wanted; ``base`` and ``child`` make their folders if they must."""
        for dtype in dtypes:
            if self._wanted(f"{name} {dtype}"):
                before, after = (folder() / f"{file or dtype}.safetensors" for folder in (base, child))
                yield Pair(name, dtype, before, after)

    def _run(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the folder of a run, which ``make`` fills unless it is there: on one thread, for the same bits."""

        def run(folder: Path) -> None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                make(folder)
            finally:
                torch.set_num_threads(threads)
            self._report(f"trained {name}, seed {self._seed}")

        folder = self._data / f"{name}-seed-{self._seed}"
        _keep(folder, run)
        return folder

    def _chain(
        self, name: str, length: int, begin: Callable[[], tuple[Mapping[str, Tensor], Iterator[float]]]
    ) -> tuple[Path, ...]:
        """Return ``length`` checkpoints of the run that ``begin`` gives: weights, and the steps that change them."""
        names = [f"{number}.safetensors" for number in range(1, length + 1)]

        def make(folder: Path) -> None:
            weights, steps = begin()
            for file in names:
                _finish(islice(steps, self._steps // length))
                _save(weights, folder / file, torch.float32)

        folder = self._run(f"chain-{length}-{name}", make)
        return tuple(folder / file for file in names)

    def _rates(self, peak: float) -> Iterator[float]:
        """Yield the learning rate of each step: up to ``peak`` in a tenth of the steps, then down to 0."""
        warm = max(1, self._steps // 10)
        for step in range(self._steps):
            yield peak * min((step + 1) / warm, self._share_left((self._steps - step) / (self._steps - warm)))

    def _share_left(self, time_left: float) -> float:
        """Return the share of the peak for what is left of the time after it, both from 1 to 0: linear."""
        return time_left


def _save_as(dtypes: Iterable[str], weights: Mapping[str, Tensor], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for dtype in dtypes:
        _save(weights, folder / f"{dtype}.safetensors", _DTYPES[dtype])


class FineTunes(_Runs):
    """What the float32 model in the folder ``base`` becomes in ``steps`` steps; other arguments as for ``pairs``."""

    _RATES = (5e-6, _LEARNING_RATE, 1e-4)
    _POLICY_RATE = 1e-6  # as is usual where rewards are learned from: most weights stay the same bfloat16
    _POLICY_STEPS = 4  # change 1 % of them
    _RANK = 8
    _ADAPTER_RATE = 2e-4
    _ADAPTER_SCALE = 2.0  # alpha 16 over the rank

    def __init__(self, base: Path, data: Path, **options: Any) -> None:
        super().__init__(data, **options)
        self._base = base

    def pairs(self) -> Iterator[Pair]:
        """Yield each pair as soon as it is there."""
        for rate in self._RATES:
            yield from self._pairs(f"fine-tune {rate:.0e}", _DTYPES, self._published, partial(self._tuned, rate))
        yield from self._pairs("frozen", _DTYPES, self._published, partial(self._tuned, _LEARNING_RATE, "frozen"))
        tuned = partial(self._tuned, _LEARNING_RATE)
        yield from self._pairs("continued", _DTYPES, tuned, partial(self._tuned, min(self._RATES), "continued"))
        before, after = (partial(self._policy, moment) for moment in ("before", "after"))
        yield from self._pairs("policy gradient", ("bfloat16",), before, after)
        merged = partial(self._run, "lora", self._adapt)
        yield from self._pairs("merged LoRA", ("float32", "bfloat16"), self._published, merged)
        for rate in self._RATES:
            without = partial(self._tuned, rate, "no-decay")
            yield from self._pairs(f"fine-tune {rate:.0e}, no decay", ("float32",), self._published, without)

    def chain(self, length: int) -> tuple[Path, ...]:
        """Return float32 checkpoints, evenly spaced, of one run at a rate that stays the same."""

        def begin() -> tuple[dict[str, Tensor], Iterator[float]]:
            weights = self._weights()
            contrast = partial(minilm.Sentences(self._base, f"chain {self._seed}").contrast, weights)
            return weights, _descend(_adamw(weights), contrast, repeat(_LEARNING_RATE))

        return self._chain(f"fine-tune-{_LEARNING_RATE:.0e}", length, begin)

    def _published(self) -> Path:
        folder = self._data / "published"
        _keep(folder, lambda unfinished: _save_as(_DTYPES, self._weights(), unfinished))
        return folder

    def _weights(self) -> dict[str, Tensor]:
        return load_file(self._base / "model.safetensors")

    def _tuned(self, rate: float, way: Literal["fine-tune", "frozen", "continued", "no-decay"] = "fine-tune") -> Path:
        name = f"{way}-{rate:.0e}"

        def make(folder: Path) -> None:
            start = self._tuned(_LEARNING_RATE) if way == "continued" else self._published()
            weights = load_file(start / "float32.safetensors")
            trained = _last_layers(weights) if way == "frozen" else ("",)
            optimizer = _adamw(weights, trained, weight_decay=0 if way == "no-decay" else _WEIGHT_DECAY)
            contrast = partial(minilm.Sentences(self._base, f"{name} {self._seed}").contrast, weights)
            _finish(_descend(optimizer, contrast, self._rates(rate)))
            _save_as(_DTYPES, weights, folder)

        return self._run(name, make)

    def _policy(self, moment: str) -> Path:
        def make(folder: Path) -> None:
            weights = self._weights()
            reward = partial(minilm.Sentences(self._base, f"policy {self._seed}").reward, weights)
            steps = _descend(_adamw(weights, weight_decay=0), reward, repeat(self._POLICY_RATE))
            # The first steps of Adam move every weight by the whole rate, later ones do not.
            for name, count in (("before", 2 * self._POLICY_STEPS), ("after", self._POLICY_STEPS)):
                _finish(islice(steps, count))
                _save_as(("bfloat16",), weights, folder / name)

        return self._run("policy", make) / moment

    def _adapt(self, folder: Path) -> None:
        weights = self._weights()
        draw = torch.Generator().manual_seed(self._seed)
        factors = {
            name: (
                torch.zeros(weight.shape[0], self._RANK),
                torch.randn(self._RANK, weight.shape[1], generator=draw) / weight.shape[1] ** 0.5,
            )
            for name, weight in weights.items()
            if name.startswith("encoder.") and weight.ndim == 2
        }

        def merged() -> dict[str, Tensor]:
            return weights | {name: weights[name] + self._ADAPTER_SCALE * a @ b for name, (a, b) in factors.items()}

        sentences = minilm.Sentences(self._base, f"lora {self._seed}")
        optimizer = _adamw(
            {
                f"{name}.{side}": factor
                for name, pair in factors.items()
                for side, factor in zip("ab", pair, strict=True)
            }
        )
        _finish(_descend(optimizer, lambda: sentences.contrast(merged()), self._rates(self._ADAPTER_RATE)))
        _save_as(("float32", "bfloat16"), merged(), folder)


class Pretrainings(_Runs):
    """GPTs of one shape, trained from scratch, ``steps`` a multiple of 10; other arguments as for ``pairs``.

    Two models, of other initial weights, text and beta2. Each is saved every tenth of the steps: as what was trained,
    and, in ``training.safetensors``, with all that its optimizer knows, named as ``torch.distributed.checkpoint`` does.
    """

    _RATE = 1e-3
    _WEIGHT_DECAY = 0.1
    _BATCH = 8
    _BETA2 = (0.999, 0.95)
    _SAVED = ((1, 2), (4, 5), (8, 9))  # early, middle and late; tenths of the steps

    def __init__(self, shape: gpt.Shape, data: Path, **options: Any) -> None:
        super().__init__(data, **options)
        self._shape = shape

    def pairs(self) -> Iterator[Pair]:
        """Yield each pair as soon as it is there."""
        tenth = self._steps // 10
        last = self._SAVED[-1][-1] * tenth
        for beta2 in self._BETA2:
            for tenths in self._SAVED:
                before, after = (count * tenth for count in tenths)
                base, child = (partial(self._checkpoint, beta2, step) for step in (before, after))
                name = f"gpt {beta2}, {after}/{before}"
                yield from self._pairs(name, ("float32", "bfloat16"), base, child)
                yield from self._pairs(f"{name}, w+m+v", ("float32",), base, child, file="training")
        base, child = (partial(self._checkpoint, beta2, last) for beta2 in self._BETA2)
        yield from self._pairs("unrelated", ("float32", "bfloat16"), base, child)

    def chain(self, length: int) -> tuple[Path, ...]:
        """Return float32 checkpoints of the first model, evenly spaced."""
        beta2 = self._BETA2[0]

        def begin() -> tuple[dict[str, Tensor], Iterator[float]]:
            weights, _, losses = self._begin(beta2)
            return weights, losses

        return self._chain(self._name(beta2), length, begin)

    def states(self, count: int, every: int) -> tuple[Path, ...]:
        """Return consecutive states of the first model, ``every`` steps apart, after a quarter of the training.

        Each is a file of all that the model and its optimizer know, in float32.
        """
        beta2 = self._BETA2[0]
        names = [f"{number}.safetensors" for number in range(count)]

        def make(folder: Path) -> None:
            weights, optimizer, losses = self._begin(beta2)
            _finish(islice(losses, self._steps // 4))
            for name in names:
                _finish(islice(losses, every))
                _save(_state(weights, optimizer), folder / name, torch.float32)
                self._report(f"state {name}")

        folder = self._run(f"states-{count}x{every}-{self._name(beta2)}", make)
        return tuple(folder / name for name in names)

    def _checkpoint(self, beta2: float, step: int) -> Path:
        return self._run(self._name(beta2), partial(self._train, beta2)) / f"{step}"

    def _name(self, beta2: float) -> str:
        return f"gpt-{self._shape.layers}x{self._shape.width}-{beta2}"

    def _share_left(self, time_left: float) -> float:
        """Return half a wave of cosine, as is usual in pre-training."""
        return (1 - math.cos(math.pi * min(time_left, 1.0))) / 2

    def _begin(self, beta2: float) -> tuple[dict[str, Tensor], torch.optim.AdamW, Iterator[float]]:
        """Return initial weights, their optimizer, and the steps that it takes."""
        seed = f"gpt {beta2} {self._seed}"
        weights = gpt.initial(self._shape, seed)
        order = random.Random(seed)
        text = gpt.text()

        def loss_of_next() -> Tensor:
            starts = [order.randrange(len(text) - gpt.CONTEXT) for _ in range(self._BATCH)]
            return gpt.loss(weights, torch.stack([text[start : start + gpt.CONTEXT + 1] for start in starts]).long())

        optimizer = _adamw(weights, weight_decay=self._WEIGHT_DECAY, beta2=beta2)
        return weights, optimizer, _descend(optimizer, loss_of_next, self._rates(self._RATE))

    def _train(self, beta2: float, folder: Path) -> None:
        weights, optimizer, losses = self._begin(beta2)
        tenth = self._steps // 10
        for count in range(1, self._SAVED[-1][-1] + 1):
            mean = fmean(islice(losses, tenth))
            self._report(f"gpt {beta2}, step {count * tenth}: mean loss {mean:.3f}")
            if any(count in tenths for tenths in self._SAVED):
                checkpoint = folder / f"{count * tenth}"
                _save_as(("float32", "bfloat16"), weights, checkpoint)
                _save(_state(weights, optimizer), checkpoint / "training.safetensors", torch.float32)


def _state(weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all that a model and its optimizer know, named as ``torch.distributed.checkpoint`` does."""
    state = {
        f"optim.state.{name}.{part}": value
        for name, weight in weights.items()
        for part, value in optimizer.state[weight].items()
    }
    return state | {f"model.{name}": weight for name, weight in weights.items()}


def _last_layers(weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(f"encoder.layer.{number}." for number in range(minilm.layers(weights))[-_TRAINED_LAYERS:])


def _adamw(
    weights: Mapping[str, Tensor],
    trained: tuple[str, ...] = ("",),
    *,
    weight_decay: float = _WEIGHT_DECAY,
    beta2: float = 0.999,
) -> torch.optim.AdamW:
    """Return an optimizer of the weights whose names begin with one of ``trained``."""
    parameters = [
        weight.requires_grad_()
        for name, weight in weights.items()
        if weight.is_floating_point() and name.startswith(trained)
    ]
    return torch.optim.AdamW(parameters, betas=(0.9, beta2), weight_decay=weight_decay)


def _descend(
    optimizer: torch.optim.AdamW, loss_of_next: Callable[[], Tensor], rates: Iterable[float]
) -> Iterator[float]:
    """Take one step at each learning rate, in place; yield the loss before each."""
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of_next()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        yield loss.item()


def _finish(steps: Iterable[float]) -> None:
    for _ in steps:
        pass


def rounded(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what is saved of weights in a floating dtype; integers stay as they are."""
    return {
        name: weight.detach().to(dtype) if weight.is_floating_point() else weight for name, weight in weights.items()
    }


def _save(weights: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    save_file(rounded(weights, dtype), path, metadata={"format": "pt"})


def main() -> None:
    """Make the pairs of a seed, and list them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    for pair in pairs(seed=seed, report=lambda line: print(line, flush=True)):
        print(f"{pair.name}, {pair.dtype}: {pair.base} -> {pair.child}", flush=True)


if __name__ == "__main__":
    main()
