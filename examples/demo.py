"""lamella on a real model: fine-tune all-MiniLM-L6-v2, push every checkpoint, and get each one back bit for bit.

    python -m examples.demo REPOSITORY

REPOSITORY is a directory that does not exist yet, or a URL such as s3://bucket/prefix. Run from the root of the source
tree; ``make demo`` does it all.
"""

import argparse
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.utils.logging import disable_progress_bar

import lamella
import lamella.torch
from benchmarks import corpora, minilm
from benchmarks.corpora import Checkpoint, Precision

MODELS: Mapping[Precision, str] = {"float32": "minilm-fp32", "bfloat16": "minilm-bf16"}


@dataclass(frozen=True, slots=True)
class Pushed:
    """One push: what went in, and what it cost."""

    revision: str
    checkpoint: str
    file: str | None
    """Name of the file, if it was pushed as one; None for a state dict."""
    sha256: str
    """Of the file, or of the state dict: see :func:`sha256_of_tensors`."""
    decoded_nbytes: int
    stored_nbytes: int
    """What the repository grew by, every object counted."""
    seconds: float


def demonstrate(family: Sequence[Checkpoint], url: str, console: Console) -> None:
    """Push ``family`` to a new repository at ``url`` and print what came of it.

    Raises
    ------
    RuntimeError
        The repository has a problem, or a checkout differs from what was pushed.
    """
    repo = lamella.init(url)
    pushes = list(push_all(repo, family))
    console.print(_pushes(pushes))
    tip = f"{MODELS['float32']}@main"
    console.print(_distances(repo, f"{tip}~1", tip))
    console.print(_one_layer(url, tip))

    start = time.perf_counter()
    found = repo.verify()
    seconds = time.perf_counter() - start
    if not found.ok:
        raise RuntimeError(f"the repository is damaged: {found.problems}")
    console.print(
        f"Verified {found.versions} versions and {found.blobs:,} blobs in {found.packs} packs: "
        f"no problem, {seconds:.2f} s.\n"
    )

    console.print(_zarr_view(url, tip))
    console.print(_directory(repo))
    console.print(_module(url, tip))

    for push in pushes:
        start = time.perf_counter()
        sha256 = sha256_of_checkout(repo, push)
        console.print(f"{push.revision:<16} {sha256[:16]}... {time.perf_counter() - start:6.2f} s")
        if sha256 != push.sha256:
            raise RuntimeError(f"{push.revision} came back as {sha256}, but {push.sha256} went in")
    console.print(f"Each of {len(pushes)} checkouts is bit for bit what was pushed (sha256).")


def push_all(repo: lamella.Repository, family: Sequence[Checkpoint]) -> Iterator[Pushed]:
    """Push every checkpoint as a state dict, in both precisions, then the published model as the file that it is."""
    for precision, model in MODELS.items():
        numbers: dict[str, int] = {}
        for checkpoint in family:
            tensors = checkpoint.tensors(precision)
            parent = None if checkpoint.parent is None else f"{model}@v{numbers[checkpoint.parent]}"
            pushed = _push(repo, tensors, checkpoint, precision, f"{model}@{checkpoint.branch}", parent)
            numbers[checkpoint.name] = int(pushed.revision.rpartition("@v")[2])
            yield pushed
    published, model = family[0], MODELS["float32"]
    yield _push(repo, published.path("float32"), published, "float32", f"{model}@published", f"{model}@v1")


def _push(
    repo: lamella.Repository,
    source: dict[str, Tensor] | Path,
    checkpoint: Checkpoint,
    precision: Precision,
    target: str,
    parent: str | None,
) -> Pushed:
    sha256 = sha256_of_file(source) if isinstance(source, Path) else sha256_of_tensors(source)
    stored_before, start = repo.stats().stored_nbytes, time.perf_counter()
    version = repo.push(
        source,
        target,
        message=f"{checkpoint.name} after {checkpoint.steps} steps",
        parent=parent,
        metrics=None if checkpoint.loss is None else {"loss": checkpoint.loss},
        recipe={"hyper_parameters": {"optimizer": "AdamW", "steps": checkpoint.steps, "precision": precision}},
    )
    seconds = time.perf_counter() - start
    return Pushed(
        revision=f"{version.model}@v{version.number}",
        checkpoint=checkpoint.name,
        file=source.name if isinstance(source, Path) else None,
        sha256=sha256,
        decoded_nbytes=version.nbytes,
        stored_nbytes=repo.stats().stored_nbytes - stored_before,
        seconds=seconds,
    )


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return one digest over the names, dtypes, shapes and bytes of a state dict, whatever its order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the digest that ``sha256sum`` prints."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_checkout(repo: lamella.Repository, push: Pushed) -> str:
    """Check out the whole version, in the form in which it was pushed, and return its digest."""
    if push.file is None:
        return sha256_of_tensors(repo.checkout(push.revision, framework="torch"))
    with TemporaryDirectory() as folder:
        repo.checkout(push.revision, Path(folder, "out"))
        return sha256_of_file(Path(folder, "out", push.file))


def _pushes(pushes: Sequence[Pushed]) -> Table:
    table = _table("Pushes, in bytes", ("version", "pushed"), ("decoded", "stored", "ratio", "seconds"))

    def add(version: str, what: str, decoded: int, stored: int, seconds: float) -> None:
        table.add_row(version, what, f"{decoded:,}", f"{stored:,}", f"{stored / decoded:.1%}", f"{seconds:.2f}")

    for push in pushes:
        what = push.checkpoint if push.file is None else f"{push.checkpoint} (file)"
        add(push.revision, what, push.decoded_nbytes, push.stored_nbytes, push.seconds)
    table.add_section()
    add(
        "all",
        "",
        sum(push.decoded_nbytes for push in pushes),
        sum(push.stored_nbytes for push in pushes),
        sum(push.seconds for push in pushes),
    )
    return table


def _distances(repo: lamella.Repository, before: str, after: str) -> Table:
    table = _table(f"Distance from {before} to {after}", ("layer",), ("L2", "largest", "cosine", "changed"))
    layers = [f"encoder.layer.{number}.*" for number in range(minilm.layers(repo.version(after)))]
    for include in ("embeddings.*", *layers, "pooler.*", "*"):
        distance = repo.distance(before, after, include=include)
        table.add_row(
            "all" if include == "*" else include,
            f"{distance.l2:.5f}",
            f"{distance.linf:.2e}",
            f"{distance.cosine:.7f}",
            f"{distance.changed:.1%}",
        )
    return table


def _table(title: str, texts: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(*texts, title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in figures:
        table.add_column(heading, justify="right")
    return table


def _one_layer(url: str, revision: str) -> str:
    """Check out the last encoder layer alone, from a repository opened for it, and say what that read."""
    repo = lamella.open(url)
    layer = f"encoder.layer.{minilm.layers(repo.version(revision)) - 1}.*"
    read_before = read_nbytes()
    tensors = lamella.open(url).checkout(revision, include=layer, framework="torch")
    read = read_nbytes() - read_before
    return (
        f"Checked out {layer} of {revision} alone: {len(tensors)} tensors, "
        f"{sum(tensor.nbytes for tensor in tensors.values()):,} bytes; "
        f"read {_amount(read, url)}, the deltas and what they stand on, of {repo.stats().stored_nbytes:,} stored.\n"
    )


def _zarr_view(url: str, revision: str) -> str:
    """Read one array of the version as Zarr, and write a changed one back through Zarr."""
    repo = lamella.open(url)
    group = repo.version(revision).zarr()
    name = "embeddings.word_embeddings.weight"
    read_before = read_nbytes()
    rows = np.asarray(dict(group.arrays())[name][:128])
    read = read_nbytes() - read_before
    if rows.tobytes() != repo.version(revision)[name][:128].tobytes():
        raise RuntimeError("the Zarr view shows other bytes than the version")
    with repo.transaction("minilm-zarr@main", message="written through Zarr") as written:
        for path, array in group.arrays():
            written.create_array(path, data=np.asarray(array[:]), attributes=array.attrs.asdict())
    same = repo.version("minilm-zarr@main").parameters_id == repo.version(revision).parameters_id
    if not same:
        raise RuntimeError("what was written through Zarr is another model")
    return (
        f"As Zarr: {len(list(group.array_keys()))} arrays; 128 rows of {name} ({rows.nbytes:,} bytes) read "
        f"{_amount(read, url)}. "
        "Copied array by array into a transaction: the same parameters id.\n"
    )


def _directory(repo: lamella.Repository) -> str:
    """Push the published model as the directory that it comes in, and get every file back."""
    folder = minilm.shipped()
    before = repo.stats().stored_nbytes
    version = repo.push(folder, "minilm-directory@main", message="as published")
    stored = repo.stats().stored_nbytes - before
    with TemporaryDirectory() as out:
        files = repo.checkout("minilm-directory@main", out)
        differing = [path for path, file in files.items() if sha256_of_file(file) != sha256_of_file(folder / path)]
    if differing:
        raise RuntimeError(f"these files came back as others: {differing}")
    total = sum(version.file_sizes.values())
    return f"As a directory: {len(files)} files, {total:,} bytes, came back byte for byte; {stored:,} bytes were new.\n"


def _module(url: str, revision: str) -> str:
    """Make a transformers model of a version without a file, then move it in place from the version before to it."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    repo = lamella.open(url)
    version = repo.version(revision)
    vocabulary, width = version["embeddings.word_embeddings.weight"].shape
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=minilm.layers(version),
        num_attention_heads=width // minilm.HEAD_WIDTH,
        intermediate_size=version["encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=version["embeddings.position_embeddings.weight"].shape[0],
    )
    tokens = torch.arange(32).reshape(2, 16) % vocabulary
    model = BertModel.from_pretrained(None, config=config, state_dict=version.state_dict())
    with TemporaryDirectory() as out:
        (Path(out) / "config.json").write_text(config.to_json_string())
        repo.checkout(revision, out)
        other = BertModel.from_pretrained(out)
    with torch.no_grad():
        if not torch.equal(model(tokens).last_hidden_state, other(tokens).last_hidden_state):
            raise RuntimeError("the model that was made without a file answers otherwise")
    load = partial(lamella.torch.load, model, repo, exclude="*position_ids", strict=False)
    reads = []
    for have in (None, f"{revision}~1"):
        load(f"{revision}~1")
        read_before = read_nbytes()
        load(revision, have=have)
        reads.append(read_nbytes() - read_before)
    return (
        "As a module: transformers made it of the version without a file, with equal outputs. Moved in place from the "
        f"version before: {_amount(reads[1], url)} read, {_amount(reads[0], url)} without saying what it held.\n"
    )


def read_nbytes() -> int:
    """Return how many bytes this process has read so far, from any file, as the kernel counts them (Linux)."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


def _amount(nbytes: int, url: str) -> str:
    """Say how many bytes were read from a repository. What comes out of a bucket the kernel does not count."""
    return "an uncounted number of bytes" if "://" in url else f"{nbytes:,} bytes"


def main() -> None:
    """Run the demo on the published model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("repository", help="directory that does not exist, or URL, for the repository")
    repository = parser.parse_args().repository
    console = Console()
    console.print("Fine-tuning all-MiniLM-L6-v2: about a minute, or none if an earlier run did it.")
    family = corpora.minilm_family(report=console.print)
    demonstrate(family, repository, console)
    console.print(f"Look around: .venv/bin/lamella -C {repository} log {MODELS['float32']} --graph")


if __name__ == "__main__":
    main()
