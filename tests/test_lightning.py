"""Lightning: training saves versions, and goes on from them as if it had never stopped."""

import copy
import math
import pickle

import pytest
import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from support import new_repository
from torch import nn
from torch.utils.data import DataLoader

import lamella
import lamella.torch
from lamella.lightning import LamellaCheckpointIO
from lamella_engine.errors import InvalidInputError, RefNotFoundError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, of which every release has others

SECTIONS = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "hyper_parameters"}
BATCHES = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


class Regression(lightning.LightningModule):
    """Two layers, an optimizer with moments, a schedule; its loss falls from epoch to epoch."""

    def __init__(self, width=8, activation="tanh", **others):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1))

    def training_step(self, batch, index):
        loss = (self.layers(batch) - 1).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)]

    def train_dataloader(self):
        return DataLoader(BATCHES, batch_size=None)


def trainer(directory, plugin, epochs, *callbacks, **options):
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=directory,
        plugins=[plugin],
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


class Recording(LamellaCheckpointIO):
    """Keeps what Lightning gave, to compare."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.given = getattr(self, "given", {}) | {str(path): copy.deepcopy(checkpoint)}
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.fixture
def repo():
    return new_repository()


def equal(a, b):
    """Whether two states are alike in structure and bits; a dict is a dict, of whatever class."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def aliases(repo):
    return {ref.name for ref in repo.refs("net") if ref.kind == "alias"}


@pytest.mark.parametrize("wrapped", [lambda plugin: plugin, AsyncCheckpointIO], ids=["at once", "in a thread"])
def test_a_checkpoint_comes_back_as_the_trainer_gave_it(tmp_path, repo, wrapped):
    plugin = Recording(repo, "net@main")
    keep_all = ModelCheckpoint(tmp_path, monitor="loss", save_top_k=-1)
    trainer(tmp_path, wrapped(plugin), 2, keep_all, EarlyStopping("loss")).fit(Regression())
    assert len(plugin.given) == 2
    for path, given in plugin.given.items():
        assert given.keys() >= SECTIONS
        assert equal(given, plugin.load_checkpoint(path))
    assert aliases(repo) == {"main/epoch-0-step-2", "main/epoch-1-step-4"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrapped", [lambda plugin: plugin, AsyncCheckpointIO], ids=["at once", "in a thread"])
@pytest.mark.parametrize("start", ["path", "revision"])
def test_training_goes_on_as_if_it_had_never_stopped(tmp_path, repo, wrapped, start):
    straight = Regression()
    trainer(tmp_path, LamellaCheckpointIO(repo, "net@straight"), 3, ModelCheckpoint(tmp_path)).fit(straight)
    checkpoint = ModelCheckpoint(tmp_path)
    trainer(tmp_path, wrapped(LamellaCheckpointIO(repo, "net@main")), 1, checkpoint).fit(Regression())
    resumed = Regression()
    path = checkpoint.best_model_path if start == "path" else "net@main"
    again = trainer(tmp_path, wrapped(LamellaCheckpointIO(repo, "net@main")), 3, ModelCheckpoint(tmp_path))
    again.fit(resumed, ckpt_path=path)
    assert again.global_step == 6
    assert equal(dict(straight.state_dict()), dict(resumed.state_dict()))
    loaded = lamella.torch.state(repo, "net@main")
    assert equal(loaded["state_dict"], dict(straight.state_dict()))


def test_a_version_says_epoch_step_and_what_was_monitored(tmp_path, repo):
    checkpoint = ModelCheckpoint(tmp_path, monitor="loss", save_top_k=-1, save_last=True)
    plugin = LamellaCheckpointIO(repo, "net@main", recipe={"data": "noise"})
    trainer(tmp_path, plugin, 2, checkpoint).fit(Regression())
    for path, score in checkpoint.best_k_models.items():
        version = repo.version(plugin.alias(path))
        assert version.metrics == {
            "epoch": int("epoch=1" in path),
            "step": 4 if "epoch=1" in path else 2,
            "loss": float(score),
        }
        assert version.message == f"step {version.metrics['step']}"
        assert version.recipe == {"data": "noise"}
    # What is saved for another reason than its rank has no rank: its score may be an older one's.
    assert repo.version("net@main/last").metrics == {"epoch": 1, "step": 4}


def test_what_top_k_drops_loses_its_alias_and_stays_in_the_history(tmp_path, repo):
    checkpoint = ModelCheckpoint(tmp_path, monitor="loss", save_top_k=1)
    trainer(tmp_path, LamellaCheckpointIO(repo, "net@main"), 3, checkpoint).fit(Regression())
    assert aliases(repo) == {"main/epoch-2-step-6"}
    assert [version.metrics["step"] for version in repo.log("net@main")] == [6, 4, 2]
    assert lamella.torch.state(repo, "net@main~2")["global_step"] == 2


def test_removing_what_is_not_there_harms_nothing(repo):
    plugin = LamellaCheckpointIO(repo, "net@main")
    plugin.remove_checkpoint("never/saved.ckpt")
    plugin.save_checkpoint({"state_dict": {"w": torch.ones(2)}}, "a/b.ckpt")
    plugin.remove_checkpoint("a/b.ckpt")
    plugin.remove_checkpoint("a/b.ckpt")
    with pytest.raises(RefNotFoundError):
        plugin.load_checkpoint("a/b.ckpt")
    assert plugin.load_checkpoint("net@main").keys() == {"state_dict"}


def test_saving_to_a_path_again_moves_its_alias(repo):
    plugin = LamellaCheckpointIO(repo, "net@main")
    for value in (1, 2):
        plugin.save_checkpoint({"value": value, "w": torch.full((2,), value)}, "last.ckpt")
    assert plugin.load_checkpoint("last.ckpt")["value"] == 2
    assert plugin.load_checkpoint("net@v1")["value"] == 1


@pytest.mark.parametrize(
    ("path", "alias"),
    [
        ("/tmp/run/epoch=0-step=2.ckpt", "net@main/epoch-0-step-2"),
        ("epoch=1-val_loss=-0.25.ckpt", "net@main/epoch-1-val_loss--0.25"),
        ("/somewhere/b@c.ckpt", "net@main/b-c"),
        ("plain", "net@main/plain"),
        ("v3.ckpt", "net@main/v3"),
        ("a..b.=.5.ckpt", "net@main/a--b---5"),
    ],
)
def test_a_path_is_an_alias_below_the_branch(repo, path, alias):
    plugin = LamellaCheckpointIO(repo, "net@main")
    assert plugin.alias(path) == alias
    plugin.save_checkpoint({"w": torch.ones(1)}, path)
    assert repo.version(alias).number == 1
    assert equal(plugin.load_checkpoint(path), {"w": torch.ones(1)})


def test_a_name_that_no_ref_can_have_is_refused_before_anything_is_stored(repo):
    with pytest.raises(InvalidInputError, match="cannot name a ref"):
        LamellaCheckpointIO(repo, "net@main").save_checkpoint({"w": torch.ones(1)}, "a.lock")
    assert repo.models() == []


def test_what_spawned_processes_hand_back_is_no_version_of_the_branch(repo):
    plugin = LamellaCheckpointIO(repo, "net@main")
    plugin.save_checkpoint({"epoch": 0, "w": torch.ones(1)}, "epoch=0.ckpt")
    for value in (2.0, 3.0):
        plugin.save_checkpoint({"w": torch.full((1,), value)}, "/tmp/x/.temp.ckpt")
        assert equal(plugin.load_checkpoint("/tmp/x/.temp.ckpt"), {"w": torch.full((1,), value)})
        plugin.remove_checkpoint("/tmp/x/.temp.ckpt")
    assert [ref.name for ref in repo.refs("net")] == ["main", "main/epoch-0"]
    assert [version.number for version in repo.log("net@main")] == [1]


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({"activation": nn.ReLU}, "save_hyperparameters(ignore=['activation'])"),
        ({"nested": {"made": print}}, "save_hyperparameters(ignore=['nested'])"),
    ],
)
def test_a_hyper_parameter_that_only_a_pickle_could_hold_is_refused_by_name(tmp_path, repo, others, named):
    plugin = LamellaCheckpointIO(repo, "net@main")
    with pytest.raises(InvalidInputError) as caught:
        trainer(tmp_path, plugin, 1, ModelCheckpoint(tmp_path)).fit(Regression(**others))
    assert caught.value.kind == "not_storable"
    assert f"'{caught.value.context['path']}' of the state" in str(caught.value)
    assert named in str(caught.value)
    assert repo.models() == []


def test_what_else_is_no_typed_data_is_refused_by_its_own_name(repo):
    with pytest.raises(InvalidInputError, match=r"'callbacks\.Mine\.hook' of the state is a builtin"):
        LamellaCheckpointIO(repo, "net@main").save_checkpoint({"callbacks": {"Mine": {"hook": print}}}, "a.ckpt")


def test_a_failure_in_a_thread_is_raised_when_training_ends(tmp_path, repo):
    plugin = AsyncCheckpointIO(LamellaCheckpointIO(repo, "net@main"))
    with pytest.raises(InvalidInputError, match="activation"):
        trainer(tmp_path, plugin, 1, ModelCheckpoint(tmp_path)).fit(Regression(activation=nn.ReLU))


def test_a_score_that_is_no_number_is_no_metric(repo):
    state = {"monitor": "loss", "best_k_models": {"a.ckpt": torch.tensor(math.inf)}}
    LamellaCheckpointIO(repo, "net@main").save_checkpoint({"epoch": 3, "callbacks": {"M": state}}, "a.ckpt")
    assert repo.version("net@main").metrics == {"epoch": 3}


def test_tensors_go_to_the_device_that_is_asked_for(repo):
    plugin = LamellaCheckpointIO(repo, "net@main")
    plugin.save_checkpoint({"w": torch.ones(2), "states": [{"m": torch.ones(2)}]}, "a.ckpt")
    found = plugin.load_checkpoint("a.ckpt", map_location="meta", weights_only=True)
    assert found["w"].is_meta
    assert found["states"][0]["m"].is_meta
    with pytest.raises(InvalidInputError, match="one device"):
        plugin.load_checkpoint("a.ckpt", map_location={"cuda:0": "cpu"})


def test_what_cannot_be_meant_is_refused(repo):
    with pytest.raises(InvalidInputError):
        LamellaCheckpointIO(repo, "net")
    with pytest.raises(InvalidInputError, match="storage_options"):
        LamellaCheckpointIO(repo, "net@main").save_checkpoint({}, "a.ckpt", storage_options={"x": 1})


def test_by_its_location_a_plugin_goes_to_other_processes(tmp_path):
    location = str(tmp_path / "weights")
    lamella.init(location).close()
    there = pickle.loads(pickle.dumps(LamellaCheckpointIO(location, "net@main")))
    there.save_checkpoint({"w": torch.ones(2)}, "a.ckpt")
    with lamella.open(location) as repo:
        assert repo.version("net@main/a").number == 1
        with pytest.raises(InvalidInputError, match="give its location"):
            pickle.dumps(LamellaCheckpointIO(repo, "net@main"))
