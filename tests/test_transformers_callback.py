"""What a transformers Trainer saves is a version, byte for byte; and a push that fails does not end training."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from support import new_repository
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerControl, TrainerState, TrainingArguments

import lamella
from lamella.transformers import LamellaCallback
from lamella_engine.errors import ConflictError, InvalidInputError, RepositoryNotFoundError

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other libraries, of which every release has others

CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=16,
)
TOKENS = torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]
PICKLED = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"}


def trainer(directory, *callbacks, **options):
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(directory), **settings | options)
    torch.manual_seed(0)
    return Trainer(BertForMaskedLM(CONFIG), arguments, train_dataset=DATA, eval_dataset=DATA, callbacks=list(callbacks))


def names(directory):
    return {str(file.relative_to(directory)) for file in Path(directory).rglob("*") if file.is_file()}


def assert_same(there, back, expected):
    assert names(back) == expected
    assert all(Path(there, name).read_bytes() == Path(back, name).read_bytes() for name in expected)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other take longer than models of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def repo():
    return new_repository()


def test_what_trainer_writes_comes_back_byte_for_byte_without_its_pickles(tmp_path, repo):
    trainer(tmp_path / "run", LamellaCallback(repo, "bert@main")).train()
    for number, step in ((1, 2), (2, 4)):
        written, back = tmp_path / f"run/checkpoint-{step}", tmp_path / f"back-{step}"
        repo.checkout(f"bert@v{number}", back)
        assert names(written) >= PICKLED
        assert_same(written, back, names(written) - PICKLED)
        assert {"config.json", "model.safetensors", "trainer_state.json"} <= names(back)


def test_with_its_pickles_training_goes_on_exactly_from_a_checkout(tmp_path, repo):
    straight = trainer(tmp_path / "run", LamellaCallback(repo, "bert@main", pickles=True))
    straight.train()
    shutil.move(tmp_path / "run/checkpoint-2", tmp_path / "written")
    repo.checkout("bert@v1", tmp_path / "again/checkpoint-2")
    assert_same(tmp_path / "written", tmp_path / "again/checkpoint-2", names(tmp_path / "written"))
    resumed = trainer(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "again/checkpoint-2"))
    after = resumed.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in straight.model.state_dict().items())


def test_a_version_says_step_loss_and_what_was_evaluated_then(tmp_path, repo):
    callback = LamellaCallback(repo, "bert@main", recipe={"data": "noise"})
    made = trainer(tmp_path, callback, eval_strategy="steps", eval_steps=4)
    made.train()
    first, last = repo.version("bert@v1"), repo.version("bert@v2")
    assert (first.message, last.message, last.recipe) == ("step 2", "step 4", {"data": "noise"})
    logged = {entry["step"]: entry["loss"] for entry in made.state.log_history if "loss" in entry}
    assert first.metrics.keys() == {"step", "epoch", "loss", "grad_norm", "learning_rate"}
    assert (first.metrics["step"], first.metrics["loss"]) == (2, logged[2])
    assert last.metrics.keys() == first.metrics.keys() | {"eval_loss"}
    assert (last.metrics["step"], last.metrics["loss"]) == (4, logged[4])
    assert callback.version.id == last.id


def test_what_was_logged_at_another_step_is_no_metric_of_this_one(tmp_path, repo):
    trainer(tmp_path, LamellaCallback(repo, "bert@main"), logging_steps=3).train()
    assert [version.metrics for version in repo.log("bert@main")] == [{"step": 4}, {"step": 2}]


def test_a_checkpoint_that_trainer_rotates_away_stays(tmp_path, repo):
    trainer(tmp_path, LamellaCallback(repo, "bert@main"), save_total_limit=1).train()
    assert not (tmp_path / "checkpoint-2").exists()
    assert [version.metrics["step"] for version in repo.log("bert@main")] == [4, 2]


class Failing:
    """A repository whose first pushes fail."""

    def __init__(self, repo, errors):
        self._repo, self._errors = repo, list(errors)

    def push(self, *args, **options):
        if self._errors:
            raise self._errors.pop(0)
        return self._repo.push(*args, **options)


MOVED = ConflictError("the branch moved: look at it", expected=1, actual=2)


@pytest.mark.parametrize("error", [MOVED, OSError("no space left")], ids=lambda error: type(error).__name__)
def test_a_push_that_fails_is_told_and_training_goes_on(tmp_path, repo, caplog, error):
    callback = LamellaCallback(Failing(repo, [error]), "bert@main")
    with caplog.at_level(logging.ERROR, "lamella"):
        assert trainer(tmp_path, callback).train().global_step == 4
    (told,) = (record for record in caplog.records if record.name == "lamella")
    assert str(error) in told.getMessage()
    assert str(tmp_path / "checkpoint-2") in told.getMessage()
    assert bool(told.exc_info) == isinstance(error, OSError)
    assert callback.failures == {2: error}
    assert [version.metrics["step"] for version in repo.log("bert@main")] == [4]


def test_a_failure_is_raised_at_the_end_if_that_is_asked_for(tmp_path, repo):
    callback = LamellaCallback(Failing(repo, [MOVED]), "bert@main", on_failure="raise_at_end")
    made = trainer(tmp_path, callback)
    with pytest.raises(ConflictError):
        made.train()
    assert made.state.global_step == 4
    assert repo.version("bert@main").metrics["step"] == 4


def test_a_failure_is_raised_at_once_if_that_is_asked_for(tmp_path, repo):
    made = trainer(tmp_path, LamellaCallback(Failing(repo, [MOVED]), "bert@main", on_failure="raise"))
    with pytest.raises(ConflictError):
        made.train()
    assert made.state.global_step == 2


def test_another_training_begins_without_failures(tmp_path, repo):
    callback = LamellaCallback(Failing(repo, [MOVED]), "bert@main", on_failure="raise_at_end")
    with pytest.raises(ConflictError):
        trainer(tmp_path / "a", callback, max_steps=2).train()
    trainer(tmp_path / "b", callback, max_steps=2).train()
    assert callback.failures == {}


def test_a_repository_that_is_not_there_is_an_error_before_training(tmp_path):
    made = trainer(tmp_path, LamellaCallback(str(tmp_path / "nowhere"), "bert@main"))
    with pytest.raises(RepositoryNotFoundError):
        made.train()
    assert made.state.global_step == 0


def test_a_location_will_do(tmp_path):
    location = str(tmp_path / "weights")
    lamella.init(location).close()
    trainer(tmp_path / "run", LamellaCallback(location, "bert@main"), max_steps=2).train()
    with lamella.open(location) as repo:
        assert repo.version("bert@main").message == "step 2"


def saved(directory, callback, **state):
    callback.on_save(TrainingArguments(str(directory), use_cpu=True), TrainerState(**state), TrainerControl())


def test_only_the_process_that_writes_pushes(tmp_path, repo):
    callback = LamellaCallback(repo, "bert@main", on_failure="raise")
    saved(tmp_path, callback, global_step=7, is_world_process_zero=False)
    assert repo.models() == []
    assert callback.version is None


def test_a_checkpoint_without_safetensors_is_not_pushed_as_if_it_had_weights(tmp_path, repo):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7/pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(InvalidInputError, match="no weights in safetensors"):
        saved(tmp_path, LamellaCallback(repo, "bert@main", on_failure="raise"), global_step=7)


def test_what_cannot_be_meant_is_refused(repo):
    with pytest.raises(InvalidInputError):
        LamellaCallback(repo, "bert")
    with pytest.raises(InvalidInputError, match="on_failure"):
        LamellaCallback(repo, "bert@main", on_failure="ignore")
