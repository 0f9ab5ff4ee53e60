"""Write the golden repositories of one format version: ``python tests/golden/make.py tests/golden/v0``.

Clocks, names and chance are replaced, so that a run with the same zstd library writes the same bytes. See README.md.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np

TESTS = Path(__file__).parents[1]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from support import append_entry, bits, copies_in, names_of, new_repository, store_of, write_pack  # noqa: E402

from lamella_engine import pushing  # noqa: E402
from lamella_engine.content_store import acting, committing, log  # noqa: E402
from lamella_engine.model import PushId  # noqa: E402
from lamella_engine.objects.memory import MemoryObjects  # noqa: E402

START = datetime(2026, 11, 21, tzinfo=UTC)


@contextmanager
def no_chance(seed: str) -> Iterator[None]:
    """Replace clocks, names and random numbers by counters that start anew, with draws that follow from a seed."""
    seconds, draws = count(), count(1)

    def now() -> str:
        return (START + timedelta(seconds=next(seconds))).isoformat(timespec="microseconds").replace("+00:00", "Z")

    def token_hex(nbytes: int) -> str:
        return hashlib.sha256(f"{seed} {next(draws)}".encode()).hexdigest()[: 2 * nbytes]

    with ExitStack() as stack:
        for module in (committing, log, pushing):
            stack.enter_context(patch.object(module, "now", now))
        for module in (committing, pushing):
            stack.enter_context(patch.object(module, "principal", lambda: "golden"))
        for drawing in (acting, log):
            stack.enter_context(patch.object(drawing, "secrets", SimpleNamespace(token_hex=token_hex)))
        clock = SimpleNamespace(time_ns=lambda: int(START.timestamp()) * 10**9 + next(seconds) * 10**6)
        stack.enter_context(patch.object(acting, "time", clock))
        yield


class Golden:
    """A repository in memory, and what has to come out of it again."""

    def __init__(self) -> None:
        self.objects = MemoryObjects()
        self.repo = new_repository(self.objects)
        self.expected: dict[str, dict[str, Any]] = {}
        """For each version, ``model@v<number>``: digests of what was pushed."""

    def push(self, tensors: Mapping[str, Any], target: str, **notes: Any) -> None:
        version = self.repo.push(tensors, target, **notes)
        self.expected[f"{version.model}@v{version.number}"] = {
            "id": version.id,
            "tensors": {name: digest_of(*what) for name, what in sorted(bits(tensors).items())},
        }

    def push_file(self, data: bytes, target: str, **notes: Any) -> None:
        with TemporaryDirectory() as directory:
            path = Path(directory, "model.safetensors")
            path.write_bytes(data)
            version = self.repo.push(path, target, **notes)
        self._expect_files(version, {"model.safetensors": data})

    def push_directory(self, files: Mapping[str, bytes], target: str, **notes: Any) -> None:
        with TemporaryDirectory() as directory:
            for name, data in files.items():
                Path(directory, name).parent.mkdir(parents=True, exist_ok=True)
                Path(directory, name).write_bytes(data)
            version = self.repo.push(directory, target, **notes)
        self._expect_files(version, files)

    def _expect_files(self, version: Any, files: Mapping[str, bytes]) -> None:
        self.expected[f"{version.model}@v{version.number}"] = {
            "id": version.id,
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        }

    def append(self, **fields: Any) -> None:
        append_entry(self.objects, **fields)
        self.repo = None  # type: ignore[assignment]


def digest_of(dtype: str, shape: tuple[int, ...], data: bytes) -> list[Any]:
    return [dtype, list(shape), hashlib.sha256(data).hexdigest()]


def tiny() -> Golden:
    """Two versions whose blobs need no zstd: every byte of this repository follows from FORMAT.md."""
    golden = Golden()
    w = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
    b = np.array([0.1, -0.0], np.float32)
    golden.push({"w": w, "b": b}, "tiny@main", message="first", metrics={"loss": 0.5})
    w = (w.view(np.uint32) + 3).view(np.float32)
    golden.push({"w": w, "b": b}, "tiny@main", message="second", metrics={"loss": 0.25}, recipe={"lr": 1e-05})
    return golden


def noise(seed: int, *shape: int) -> Any:
    """Return numbers that follow from integers alone, on every machine."""
    state = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return ((state >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)).reshape(shape)


def small() -> Golden:
    """Every kind of tensor, encoding, ref and note; enough entries for several folds."""
    golden = Golden()
    layers = {f"layer.{n}.weight": noise(n, 48, 24) for n in range(3)}
    kinds = {
        "bf16": noise(10, 40, 9).astype(ml_dtypes.bfloat16),
        "f16": noise(11, 40, 9).astype(np.float16),
        "f64": noise(12, 100).astype(np.float64),
        "f8": noise(13, 200).astype(ml_dtypes.float8_e4m3fn),
        "complex": noise(14, 60).view(np.complex64),
        "int64": np.arange(300) // 7,
        "bool": np.arange(500) % 5 == 0,
        "uint8": np.frombuffer(b"lamella " * 50, np.uint8),
        "nan": np.full(100, 0x7FC00123, np.uint32).view(np.float32),
        "specials": np.array([0, 1 << 31, 0x7F800001, 0xFFC0_1234, 0x7F80_0000, 1, 0x8000_0001] * 8, np.uint32).view(
            np.float32
        ),
        "scalar": np.float32(3.5),
        "empty": np.empty((0, 5), np.float32),
        "short": np.array([-0.0, np.nan], np.float32),
        "naïve/名": np.ones((2, 3), np.int8),
    }
    tied = {"head": layers["layer.0.weight"]}
    golden.push(layers | kinds | tied, "net@main", message="first", recipe={"seed": 1, "tags": ["a", None, 0.1]})
    for step in range(1, 7):
        layers = {name: nudged(tensor, step) for name, tensor in layers.items()}
        metrics = {"loss": 1 / step, "worst": float("inf") if step % 2 else float("nan"), "step": step}
        golden.push(
            layers | kinds | {"head": layers["layer.0.weight"]}, "net@main", message=f"step {step}", metrics=metrics
        )
    golden.repo.branch("net@tuned", "net@v3")
    golden.push({"layer.0.weight": layers["layer.0.weight"][:40]}, "net@tuned", message="cut")
    golden.repo.tag("net@release", "net@v2")
    golden.repo.alias("net@production", "net@v2")
    golden.repo.alias("net@production", "net@v7")
    golden.repo.branch("net@gone", "net@v1")
    golden.repo.delete_ref("net@gone")
    golden.push_file(safetensors(), "file@main", message="a file")
    pipeline = {
        "unet/x.safetensors": safetensors(),
        "vae/x.safetensors": safetensors(),
        "index.json": b"{}\n",
        "e": b"",
    }
    golden.push_directory(pipeline, "pipeline@main", message="the same names in two files")
    golden.repo.branch("net@main", "net@v5")
    golden.push({"x": noise(99, 30)}, "other@main", recipe=None)
    return golden


def nudged(tensor: Any, seed: int) -> Any:
    """Move each number by a few steps of its last digit."""
    steps = (np.random.PCG64(seed).random_raw(tensor.size) % np.uint64(5)).astype(np.uint32).reshape(tensor.shape)
    return (tensor.view(np.uint32) + steps).view(np.float32)


def safetensors() -> bytes:
    """Return a file with an order, spaces and metadata of its own, and a sub-byte tensor."""
    header = (
        b'{"b":{"shape":[4,3],"dtype":"BF16","data_offsets":[36,60]},  "__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},"q":{"dtype":"F4","shape":[8],"data_offsets":[32,36]}}'
    )
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + bytes(range(100, 160))


def replaced() -> Golden:
    """What later lamellas write: a pack that two others replaced, one that was condemned, a push that was fenced."""
    golden = Golden()
    weights = {name: noise(seed, 20, 20) for seed, name in enumerate("abcd")}
    golden.push(weights, "net@main", message="first")
    weights = {name: nudged(tensor, 1) for name, tensor in weights.items()}
    golden.push(weights, "net@main", message="second")
    first, second = store_of(golden.repo).log.state.packs()
    copies = list(copies_in(golden.objects, first.name).values())
    half = len(copies) // 2
    packs = tuple(write_pack(golden.objects, part) for part in (copies[:half], copies[half:]))
    golden.append(packs=packs, replaced={first.name: tuple(pack.name for pack in packs)})
    # The second generation of one pack, as a later repack would leave it; and the deltas as they were.
    again = write_pack(golden.objects, reversed(list(copies_in(golden.objects, packs[0].name).values())))
    golden.append(packs=(again,), replaced={packs[0].name: (again.name,)}, pushes=(PushId("0a" * 16),))
    lonely = write_pack(golden.objects, [next(iter(copies_in(golden.objects, second.name).values()))])
    golden.append(packs=(replace(lonely, verifier="writer"),))
    golden.append(packs=(lonely,))  # somebody has decoded it since
    golden.append(condemned=(lonely.name,), fenced=(PushId("0b" * 16),))
    for gone in (first.name, packs[0].name, lonely.name):
        golden.objects.delete(gone)
    return golden


def tuned() -> Golden:
    """Residuals that are entropy-coded: floats of several widths, drift, rows without a change."""
    golden = Golden()
    dtypes = ("float8_e4m3fn", "bfloat16", "float16", "float32", "float64")
    weights = {name: noise(seed, 20, 128).astype(name) for seed, name in enumerate(dtypes)}
    weights["decayed"] = noise(9, 30, 100)
    golden.push(weights, "net@main", message="first")
    for step in (1, 2):
        for seed, name in enumerate(dtypes):
            lanes = weights[name].view(f"u{weights[name].itemsize}")
            draws = np.random.PCG64(10 * step + seed).random_raw(lanes.size).reshape(lanes.shape)
            spread = np.uint64(1 << lanes.itemsize)
            steps = (draws % spread * (draws >> np.uint64(32)) % (spread + np.uint64(1))).astype(lanes.dtype)
            steps[3:5] = 0
            steps[8:] *= 5  # so that there are quiet rows and lively ones
            weights[name] = (lanes + steps).view(weights[name].dtype)
        lanes = weights["decayed"].view(np.uint32)
        weights["decayed"] = (lanes - 40 - 20 * (lanes >> 22 & 1)).view(np.float32)
        golden.push(weights, "net@main", message=f"step {step}")
    return golden


def trained() -> Golden:
    """What mixed-precision training keeps: weights in two types, moments that guide and decay; and a sketch."""
    golden = Golden()
    weights, first, second = noise(1, 130, 128), noise(2, 130, 128), noise(3, 130, 128) ** 2
    for step in range(3):
        golden.push(
            {
                "half": weights.astype("bfloat16"),
                "master": weights,
                "optimizer.exp_avg": first * np.sqrt(second),
                "optimizer.exp_avg_sq": second,
            },
            "net@main",
            message=f"step {step}",
        )
        weights = nudged(weights, step)
        weights[::3] = weights[::3] * np.float32(1.001)
        first = noise(10 + step, 130, 128)
        second = second * np.float32(0.96) + noise(20 + step, 130, 128) ** 2 * np.float32(0.04)
    return golden


REPOSITORIES: tuple[Callable[[], Golden], ...] = (tiny, small, replaced, tuned, trained)


def make(out: Path) -> None:
    """Write every repository below ``out``, which is made anew, each beside what is expected of it."""
    if out.exists():
        shutil.rmtree(out)
    for build in REPOSITORIES:
        with no_chance(build.__name__):
            golden = build()
        for name in names_of(golden.objects):
            path = out / build.__name__ / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(golden.objects.get(name))
        expected = json.dumps(golden.expected, indent=1, sort_keys=True, ensure_ascii=False)
        (out / f"{build.__name__}.json").write_text(expected + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
