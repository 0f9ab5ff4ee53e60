"""The demo and the benchmarks, on a model small enough to run here: so that they cannot rot unseen."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import s3
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import lamella
from benchmarks import (
    chains,
    codec,
    coders,
    corpora,
    distance,
    flood,
    gpt,
    gpu,
    memory,
    minilm,
    partial,
    peers,
    push_checkout,
    ranks,
    service,
    stalls,
)
from benchmarks.corpora import PRECISIONS, Checkpoint, Pair
from examples import demo
from lamella_engine.checkpoints.arrivals import Arrivals
from lamella_engine.chunking import grid

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "_", *"abcdefghijklmnopqrstuvwxyz"]
VOCABULARY += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
WIDTH = 32
LAYERS = 3
SHAPE = gpt.Shape(layers=1, width=gpt.HEAD_WIDTH)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads gain nothing on a model this small, and on a busy machine wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture(scope="module")
def pairs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Every pair, of models that are small and hardly trained, by its name and dtype."""
    data = tmp_path_factory.mktemp("pairs")
    runs = (corpora.FineTunes(base, data, steps=2, seed=0), corpora.Pretrainings(SHAPE, data, steps=10, seed=0))
    return {f"{pair.name} {pair.dtype}": pair for run in runs for pair in run.pairs()}


def test_the_checkpoints_of_a_pair_differ_in_nothing_but_bits(pairs: dict[str, Pair]):
    for pair in pairs.values():
        before, after = load_file(pair.base), load_file(pair.child)
        assert bits(before) != bits(after)
        assert {name: (x.shape, x.dtype) for name, x in before.items()} == {
            name: (x.shape, x.dtype) for name, x in after.items()
        }
        assert {x.dtype for x in after.values() if x.is_floating_point()} == {getattr(torch, pair.dtype)}


def test_a_pair_in_sixteen_bits_is_the_same_pair_rounded(pairs: dict[str, Pair]):
    for name in ("fine-tune 2e-05", "frozen", "continued", "merged LoRA", "gpt 0.999, 9/8"):
        whole, rounded = (load_file(pairs[f"{name} {dtype}"].child) for dtype in ("float32", "bfloat16"))
        floats = {key: value for key, value in whole.items() if value.is_floating_point()}
        assert bits({key: value.bfloat16() for key, value in floats.items()}) == bits(
            {key: rounded[key] for key in floats}
        )


def test_a_merged_lora_changes_matrices_of_the_encoder_by_low_rank(pairs: dict[str, Pair]):
    pair = pairs["merged LoRA float32"]
    before, after = load_file(pair.base), load_file(pair.child)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if name.startswith("encoder.") and after[name].ndim == 2}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-2) <= 8


def test_a_training_checkpoint_has_both_moments_of_every_weight(pairs: dict[str, Pair]):
    state = load_file(pairs["gpt 0.95, 5/4, w+m+v float32"].child)
    weights = load_file(pairs["gpt 0.95, 5/4 float32"].child)
    for name, weight in weights.items():
        assert torch.equal(state[f"model.{name}"], weight)
        assert (
            state[f"optim.state.{name}.exp_avg"].shape == state[f"optim.state.{name}.exp_avg_sq"].shape == weight.shape
        )
        assert state[f"optim.state.{name}.step"] == 5
    assert len(state) == 4 * len(weights)


def test_a_gpt_learns():
    data = gpt.text()[:129].long()[None]
    weights = gpt.initial(SHAPE, "seed")
    untrained = gpt.loss(weights, data).item()
    assert untrained == pytest.approx(np.log(256), abs=0.1)
    optimizer = torch.optim.AdamW([weight.requires_grad_() for weight in weights.values()], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        torch.autograd.backward(gpt.loss(weights, data))
        optimizer.step()
    assert gpt.loss(weights, data).item() < untrained - 1


def test_what_a_gpt_expects_of_the_next_byte_adds_up_to_one():
    weights = {name: 10 * weight for name, weight in gpt.initial(SHAPE, "seed").items()}

    def total(text: Tensor) -> float:
        return (text.shape[1] - 1) * gpt.loss(weights, text).item()

    known = gpt.text()[:10].long()[None]
    before = total(known)  # which is part of what follows only if no guess sees what comes after it
    guesses = [before - total(torch.cat([known, torch.tensor([[byte]])], dim=1)) for byte in range(256)]
    assert np.exp(guesses).sum() == pytest.approx(1, abs=1e-3)


def test_a_client_is_measured_in_quiet_and_in_every_flood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flood, "WARM_UP_S", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = flood.measure(tmp_path, seconds=0.0, spell_s=0.2, floods=list(flood.FLOODS), rate=100.0)
    assert {name for name, _ in told.seconds} == set(flood.FLOODS) == set(told.attempts)
    assert all(seconds.quiet or seconds.flooded for seconds in told.seconds.values())
    Console(file=io.StringIO()).print(flood.table(told))


def test_a_service_is_compared_and_everybody_is_answered(
    family: tuple[Checkpoint, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("XDG_CACHE_HOME", "LAMELLA_CA", "LAMELLA_TOKEN"):
        monkeypatch.setenv(name, "")  # so that what the benchmark sets is taken back
    seconds = service.compare(family, rounds=1, folder=tmp_path)
    assert {"push, embedded", "push, grpc", "checkout, grpc + TLS", "whole files over HTTP"} <= seconds.keys()
    assert {len(found) for found in service.small_calls(3, tmp_path).values()} == {3}
    found = service.crowd(3, tmp_path)
    assert (len(found.seconds), found.failures) == (3, [])
    step = service.follow(2 << 20, tmp_path)
    assert 0 < step.received_nbytes < step.decoded_nbytes / 10


def test_the_same_seed_trains_the_same_and_only_what_is_wanted(pairs: dict[str, Pair], base: Path, tmp_path: Path):
    for seed, same in ((0, True), (1, False)):
        (tuned,) = corpora.FineTunes(
            base, tmp_path, steps=2, seed=seed, wanted="fine-tune 5e-06 float16".__eq__
        ).pairs()
        (late,) = corpora.Pretrainings(
            SHAPE, tmp_path, steps=10, seed=seed, wanted="gpt 0.95, 9/8, w+m+v float32".__eq__
        ).pairs()
        for pair in (tuned, late):
            made = pairs[f"{pair.name} {pair.dtype}"]
            assert (pair.child.read_bytes() == made.child.read_bytes()) is same
    assert {path.name for path in tmp_path.iterdir()} == {
        "published",
        *(f"{run}-seed-{seed}" for run in ("fine-tune-5e-06", "gpt-1x64-0.95") for seed in (0, 1)),
    }


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_the_demo_gets_back_what_it_pushed(
    place: str,
    family: tuple[Checkpoint, ...],
    tmp_path: Path,
    use: Callable[[s3.Server], None],
    request: pytest.FixtureRequest,
):
    if place == "bucket":
        use(request.getfixturevalue("seaweedfs"))
    url = s3.new_url() if place == "bucket" else str(tmp_path / "repository")
    text = io.StringIO()
    demo.demonstrate(family, url, Console(file=text, width=200))
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


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, that it is alone and overwrites
def test_every_contender_of_a_pause_saves_in_every_round(tmp_path: Path):
    state = gpt.initial(SHAPE, "pauses")
    alone, busy = stalls.measure(state, tmp_path, rounds=3)
    assert list(busy) == ["memcpy", "lamella"]
    assert {len(pauses.others) for pauses in (*alone.values(), *busy.values())} == {2}
    # One push a round alone, two beside one another for each of both contenders, less those beside the memcpy.
    repo = lamella.open(str(tmp_path / "repository"))
    assert len(list(repo.log("gpt@main"))) == 3 + 3 * 3
    assert stalls.table(alone, "").row_count == len(alone)


def test_every_contender_saves_from_its_ranks_and_what_is_kept_is_counted(tmp_path: Path):
    states = corpora.Pretrainings(SHAPE, tmp_path, steps=8, seed=0).states(3, 1)
    found = ranks.measure(states, tmp_path, rounds=1, models=2, mib=16)
    assert [set(one["seconds"]) for one in found] == [set(found[0]["seconds"])] * ranks.RANKS
    sizes = found[0]["sizes"]
    assert {len(values) for values in sizes.values()} == {3}
    assert sizes["lamella, 2 ranks"][-1] < sum(sizes["torch.save"])
    assert found[0]["memory"]["sent"] > 0
    assert len(list(ranks.tables(found, 1, 2))) == 3


def test_without_a_gpu_it_is_said_that_nothing_was_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="nothing was run and nothing measured"):
        gpu.main()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, that it is alone and overwrites
def test_what_is_measured_of_a_gpu_runs_without_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", f"gpu --device cpu --rounds 2 --layers 1 --width 64 --folder {tmp_path}".split())
    begun = Arrivals.expect
    expected: list[object] = []
    monkeypatch.setattr(Arrivals, "expect", lambda *given: expected.append(given[1]) or begun(*given))
    gpu.main()
    told = capsys.readouterr().out
    assert "No GPU" in told
    assert "a step of the GPU" not in told
    for row in ("through the ring", "one by one, unpinned", "lamella, wait=False", "dcp.save to lamella"):
        assert row in told
    assert "recorded what it was when it was staged: yes" in told
    assert len(expected) >= 2 * len(set(expected)) > 0


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


def test_chains_are_as_deep_as_their_bounds_allow(base: Path, tmp_path: Path):
    fine_tune = corpora.FineTunes(base, tmp_path / "data", steps=4, seed=0).chain(4)
    gpt_run = corpora.Pretrainings(SHAPE, tmp_path / "data", steps=10, seed=0).chain(2)
    assert [len({path.read_bytes() for path in paths}) for paths in (fine_tune, gpt_run)] == [4, 2]
    all_bounds = [chains.Bounds(0), chains.Bounds(2), chains.Bounds(3), chains.Bounds(3, longest_chain=1)]
    results = chains.measure(fine_tune, torch.bfloat16, all_bounds, folder=tmp_path, rounds=1)
    full, shallow, deep, short = (results[bounds] for bounds in all_bounds)
    assert [full.depths, shallow.depths, deep.depths] == [[0] * 4, [0, 1, 2, 2], [0, 1, 2, 3]]
    assert max(short.depths) == 1  # only one more delta like a known one can be too long
    assert deep.stored_nbytes < full.stored_nbytes
    assert deep.read_nbytes[0] == full.read_nbytes[0] < deep.read_nbytes[-1]
    assert chains.table(results, "tiny").row_count == len(all_bounds)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_every_coder_gives_back_a_pair_and_the_missing_are_left_out(pairs: dict[str, Pair], tmp_path: Path):
    wanted = [pairs["fine-tune 2e-05 bfloat16"], pairs["gpt 0.999, 9/8, w+m+v float32"]]
    outcomes = {pair: codec.measure(pair, folder=tmp_path, rounds=1) for pair in wanted}
    for pair, outcome in outcomes.items():
        whole, *parts = outcome.sizes
        assert (
            {"zstd-3", "planes + zstd-3", "BitX", "lamella alone", "lamella"} <= set(whole.stored) <= set(coders.CODERS)
        )
        assert whole.nbytes == sum(x.nbytes for x in load_file(pair.child).values() if x.is_floating_point())
        assert [part.part for part in parts] == (["w", "m", "v"] if "m" in pair.name else [])
        for coder, stored in whole.stored.items():
            assert not parts or stored == sum(part.stored[coder] for part in parts)
        assert outcome.speed is not None
        assert min(*outcome.speed.rates.values(), *outcome.speed.scaling.values()) > 0
        assert outcome.pushed is not None
    tables = [table(outcomes) for table in (codec.size_table, codec.speed_table, codec.repository_table)]
    assert [table.row_count for table in tables] == [5, 2, 2]
    missing = {coder for coder, version in outcome.versions.items() if version is None}
    assert missing == set(coders.CODERS) - set(whole.stored)
    assert all(f"{coder} is not installed" in str(tables[0].caption) for coder in missing)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [coders.Zstd, coders.Planes, coders.BitX, coders.Lamella, coders.LamellaAlone])
@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
def test_a_coder_that_gives_back_other_bits_is_found_out(
    kind: type[coders.Coder], dtype: str, width: int, tmp_path: Path
):
    class Wrong(kind):  # type: ignore[misc, valid-type]
        def decode(self, stored, base, guide, out):
            super().decode(stored, base, guide, out)
            out[-1] ^= 1

    for seed, name in enumerate(("child", "base")):
        np.random.default_rng(seed).integers(0, 256, 3000 * width, np.uint8).tofile(tmp_path / name)
    runs = [(0, 1000 * width), (1000 * width, 3000 * width)]
    job = coders.Job("", str(tmp_path), dtype, width, runs, [2000 * width, None])
    sizes = coders.Bench(job, kind(job)).answer("check")
    assert len(sizes) == 2
    with pytest.raises(ValueError, match="run 0 did not come back"):
        coders.Bench(job, Wrong(job)).answer("check")


def test_a_coder_that_fails_says_why(pairs: dict[str, Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codec, "grid", lambda shape, itemsize: grid((1,), 1))
    with pytest.raises(RuntimeError, match=r"(?s)lamella alone fails: .*1 bytes are no chunk"):
        codec.measure(pairs["fine-tune 2e-05 bfloat16"], ("sizes",), folder=tmp_path)
