"""The demo and the benchmarks, on a model small enough to run here: so that they cannot rot unseen."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import lamella
from benchmarks import corpora, distance, memory, minilm, partial, peers, push_checkout
from benchmarks.corpora import PRECISIONS, Checkpoint
from examples import demo

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "_", *"abcdefghijklmnopqrstuvwxyz"]
VOCABULARY += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
WIDTH = 32
LAYERS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of three narrow layers and random weights."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    draw = torch.Generator().manual_seed(0)

    def linear(name: str, outputs: int, inputs: int) -> dict[str, Tensor]:
        weight = torch.randn(outputs, inputs, generator=draw) / inputs**0.5
        return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(outputs)}

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.ones(WIDTH), f"{name}.bias": torch.zeros(WIDTH)}

    weights = {
        f"embeddings.{name}_embeddings.weight": torch.randn(rows, WIDTH, generator=draw)
        for name, rows in (("word", len(VOCABULARY)), ("position", minilm.MAX_TOKENS), ("token_type", 2))
    }
    weights |= norm("embeddings.LayerNorm") | {"embeddings.position_ids": torch.arange(minilm.MAX_TOKENS)[None]}
    for number in range(LAYERS):
        layer = f"encoder.layer.{number}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            weights |= linear(f"{layer}.{part}", WIDTH, WIDTH)
        weights |= norm(f"{layer}.attention.output.LayerNorm") | norm(f"{layer}.output.LayerNorm")
        weights |= linear(f"{layer}.intermediate.dense", 2 * WIDTH, WIDTH)
        weights |= linear(f"{layer}.output.dense", WIDTH, 2 * WIDTH)
    weights |= linear("pooler.dense", WIDTH, WIDTH)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def family(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, ...]:
    return corpora.family(base, tmp_path_factory.mktemp("data") / "family", steps=2, seed=0)


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()
    }


def test_the_published_model_finds_the_sentence_that_means_the_same():
    folder = minilm.shipped()
    tokens, present = minilm.Tokenizer(folder / "vocab.txt")(
        ["A cat sits on the mat, naïvely.", "A kitten rests on a rug.", "The bank raised interest rates in 2023!"]
    )
    assert tokens[0].tolist() == [101, 1037, 4937, 7719, 2006, 1996, 13523, 1010, 15743, 2135, 1012, 102]
    vectors = minilm.embed(load_file(folder / "model.safetensors"), tokens, present)
    cat_kitten, cat_bank = (vectors[0] @ vectors[1:].T).tolist()
    # The figures of the transformers library for the same files.
    assert cat_kitten == pytest.approx(0.6331, abs=1e-3)
    assert cat_bank == pytest.approx(0.0297, abs=1e-3)


def test_the_first_checkpoint_is_the_base_file_itself(base: Path, family: tuple[Checkpoint, ...]):
    assert family[0].path("float32").read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_fine_tune_changes_every_weight_that_takes_part(family: tuple[Checkpoint, ...]):
    checkpoints = {checkpoint.name: bits(checkpoint.tensors("float32")) for checkpoint in family}
    unused = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    for before, after in (("base", "main-1"), ("main-1", "main-2"), ("main-2", "main-3")):
        same = {name for name, data in checkpoints[after].items() if data == checkpoints[before][name]}
        assert same == unused


def test_a_frozen_fine_tune_changes_the_last_two_layers_only(family: tuple[Checkpoint, ...]):
    checkpoints = {checkpoint.name: checkpoint for checkpoint in family}
    for precision in PRECISIONS:
        before, after = (bits(checkpoints[name].tensors(precision)) for name in ("base", "frozen-1"))
        changed = {name for name, data in after.items() if data != before[name]}
        assert changed
        assert all(name.startswith(("encoder.layer.1.", "encoder.layer.2.")) for name in changed)


def test_the_same_seed_makes_the_same_family(base: Path, family: tuple[Checkpoint, ...], tmp_path: Path):
    again = corpora.family(base, tmp_path / "family", steps=2, seed=0)
    other = corpora.family(base, tmp_path / "other", steps=2, seed=1)
    for one, same in zip(family, again, strict=True):
        assert one.path("bfloat16").read_bytes() == same.path("bfloat16").read_bytes()
    assert other[-1].path("float32").read_bytes() != again[-1].path("float32").read_bytes()


def test_a_family_on_disk_is_not_made_again(base: Path, family: tuple[Checkpoint, ...]):
    made: list[str] = []
    assert corpora.family(base, family[0].folder, steps=2, seed=0, report=made.append) == family
    assert made == []


def test_the_demo_gets_back_what_it_pushed(family: tuple[Checkpoint, ...], tmp_path: Path):
    text = io.StringIO()
    demo.demonstrate(family, str(tmp_path / "repository"), Console(file=text, width=200))
    assert f"Each of {2 * len(family) + 1} checkouts is bit for bit what was pushed" in text.getvalue()


def test_every_contender_writes_and_reads_the_whole_family(family: tuple[Checkpoint, ...], tmp_path: Path):
    comparison = push_checkout.compare(family, "bfloat16", folder=tmp_path, rounds=1)
    assert comparison.decoded_nbytes == comparison.writing["cp"].stored_nbytes
    assert set(comparison.writing) == set(push_checkout.WRITERS)
    assert set(comparison.reading) == set(push_checkout.READERS)
    assert push_checkout.table(comparison, "tiny").row_count == len(comparison.writing) + len(comparison.reading)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["random", "sparse"])
def test_memory_is_measured_over_a_real_push(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert memory.run(tmp_path, kind, 1 / 64)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[5] for line in lines] == (["push", "checkout"] if kind == "random" else ["push"])
    pushed = lamella.open(tmp_path / "repository").version("m@main")
    assert pushed.nbytes == 16 << 20


def test_peers_give_back_what_they_stored_and_the_missing_are_said_to_be_missing(
    family: tuple[Checkpoint, ...], tmp_path: Path
):
    names = ("cp", "lamella", "Glyd")
    outcomes = peers.compare(family, "bfloat16", folder=tmp_path, rounds=1, names=names)
    copied, pushed = outcomes["cp"], outcomes["lamella"]
    assert isinstance(copied, peers.Outcome)
    assert isinstance(pushed, peers.Outcome)
    nbytes = sum(checkpoint.path("bfloat16").stat().st_size for checkpoint in family)
    assert (copied.stored_nbytes, copied.storing, copied.loading, copied.rounds) == (nbytes, 1.0, 1.0, 1)
    assert (copied.back, pushed.back) == ("file", "file")
    assert outcomes["Glyd"] == "not installed"
    table = peers.table({"bfloat16": outcomes}, {"bfloat16": nbytes})
    assert table.row_count == 2
    assert table.caption == "Glyd, bfloat16: not installed"
    assert list(tmp_path.iterdir()) == []


def test_a_peer_that_gives_back_other_bits_is_found_out(family: tuple[Checkpoint, ...], tmp_path: Path):
    source = family[0].path("float32")
    sources = [peers.Source("base", None, "main", str(source))]
    tensors = load_file(source)
    save_file(tensors, tmp_path / "base", metadata={"format": "pt", "other": "header"})
    assert peers.what_came_back(sources, tmp_path) == "tensors"
    next(iter(tensors.values())).view(torch.uint8).reshape(-1)[0] ^= 1
    save_file(tensors, tmp_path / "base", metadata={"format": "pt"})
    assert peers.what_came_back(sources, tmp_path) == "changed"
    (tmp_path / "base").write_bytes(source.read_bytes())
    assert peers.what_came_back(sources, tmp_path) == "file"


def test_every_part_is_the_same_from_a_file_and_from_a_repository(family: tuple[Checkpoint, ...], tmp_path: Path):
    source = family[-1].path("bfloat16")
    lamella.init(tmp_path / "repository").push(source, "m@main")
    for part in partial.PARTS:
        theirs = partial.measure("safetensors", str(source), "m@main", part)
        ours = partial.measure("lamella", str(tmp_path / "repository"), "m@main", part)
        assert theirs.digest == ours.digest
        assert min(ours.cold, ours.again, ours.kept) > 0


def test_a_part_is_read_by_both_in_processes_of_their_own(
    family: tuple[Checkpoint, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(partial, "VERSIONS", ("main-3",))
    monkeypatch.setattr(partial, "PARTS", partial.PARTS[-1:])
    (row,) = partial.compare(family, "bfloat16", folder=tmp_path, rounds=1)
    assert set(row.seconds) == set(partial.TEMPERATURES)
    assert row.nbytes == len(VOCABULARY) * WIDTH * 2  # fewer rows than would be picked from the middle
    assert partial.table([row], "tiny").row_count == 1
    assert list(tmp_path.iterdir()) == []


def test_torch_and_lamella_measure_the_same_distances(
    family: tuple[Checkpoint, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(distance, "THREADS", (1,))
    for precision in PRECISIONS:
        rows = distance.compare(family, precision, folder=tmp_path, rounds=1)
        assert [row.pair for row in rows] == list(distance.PAIRS)
        shared = {row.pair: row.shared for row in rows}
        assert shared["base", "main-1"] < shared["base", "frozen-1"] < shared["base", distance.PART] < 1
        assert distance.table(rows, "tiny").row_count == len(rows)
    assert list(tmp_path.iterdir()) == []
