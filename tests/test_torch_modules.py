"""Modules, optimizers and nested states: pushed, and back in place, bit by bit."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from faults import CountingObjects
from safetensors import safe_open
from safetensors.torch import save_file
from support import new_repository, open_again
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

import lamella.torch
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.errors import CorruptionError, InvalidInputError, TensorNotFoundError
from lamella_engine.objects.memory import MemoryObjects


class Net(nn.Module):
    """Two layers, tied ends, and buffers of both kinds."""

    def __init__(self, dtype=torch.float32, **options):
        super().__init__()
        self.embed = nn.Embedding(50, 16, dtype=dtype, **options)
        self.hidden = nn.Linear(16, 16, dtype=dtype, **options)
        self.head = nn.Linear(16, 50, bias=False, dtype=dtype, **options)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, **options))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, tokens):
        return self.head(torch.tanh(self.hidden(self.embed(tokens)))) * self.scratch[0]


def net(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    made = Net(dtype)
    made.steps.fill_(seed)
    return made


def bits_of(module_or_state):
    """Return dtype, shape and bytes (on the meta device none) of each tensor by name."""
    state = module_or_state.state_dict() if isinstance(module_or_state, nn.Module) else module_or_state
    return {name: (tensor.dtype, tuple(tensor.shape), octets(tensor.detach())) for name, tensor in state.items()}


def octets(tensor):
    return None if tensor.is_meta else tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def repo():
    return new_repository()


TOKENS = torch.tensor([[1, 2, 3], [7, 49, 0]])


# -- modules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_is_filled_in_place(repo, dtype):
    pushed, loaded = net(1, dtype), net(2, dtype)
    lamella.torch.push(pushed, repo, "m@main")
    parameters = list(loaded.parameters())
    addresses = [parameter.data_ptr() for parameter in parameters]
    assert lamella.torch.load(loaded, repo, "m@main") == ([], [])
    assert bits_of(loaded) == bits_of(pushed)
    assert all(one is other for one, other in zip(loaded.parameters(), parameters, strict=True))
    assert [parameter.data_ptr() for parameter in parameters] == addresses
    assert bits_of({"y": loaded(TOKENS)}) == bits_of({"y": pushed(TOKENS)})


def test_a_module_makes_the_version_of_its_state_dict(repo):
    version = lamella.torch.push(net(1), repo, "m@main", message="one", metrics={"loss": 0.5}, recipe={"lr": 1})
    assert version.files == ()
    assert (version.message, version.metrics, version.recipe) == ("one", {"loss": 0.5}, {"lr": 1})
    assert repo.push(net(1).state_dict(), "other@main").parameters_id == version.parameters_id


def test_autograd_notices_that_a_parameter_was_filled(repo):
    lamella.torch.push(net(1), repo, "m@main")
    module = net(2)
    loss = module(TOKENS).sum()
    lamella.torch.load(module, repo, "m@main")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_optimizer_goes_on_with_the_parameters_that_were_filled(repo):
    lamella.torch.push(net(1), repo, "m@main")
    module = net(2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    lamella.torch.load(module, repo, "m@main")
    before = bits_of(module)
    module(TOKENS).sum().backward()
    optimizer.step()
    assert bits_of(module)["hidden.weight"] != before["hidden.weight"]


def test_a_module_on_the_meta_device_is_made_real(repo):
    pushed = net(1)
    lamella.torch.push(pushed, repo, "m@main")
    module = Net(device="meta")
    module.hidden.weight.requires_grad_(False)
    module.hidden.bias.note = "kept"
    assert lamella.torch.load(module, repo, "m@main") == ([], [])
    assert bits_of(module) == bits_of(pushed)
    assert module.head.weight is module.embed.weight
    assert type(module.hidden.weight) is nn.Parameter
    assert not module.hidden.weight.requires_grad
    assert module.embed.weight.requires_grad
    assert module.hidden.bias.note == "kept"
    assert bits_of({"y": module(TOKENS)}) == bits_of({"y": pushed(TOKENS)})


def test_a_parameter_keeps_its_class_when_it_is_made_real(repo):
    class Scaled(nn.Parameter):
        pass

    lamella.torch.push(net(1), repo, "m@main")
    module = Net(device="meta")
    module.hidden.weight = Scaled(module.hidden.weight.detach())
    lamella.torch.load(module, repo, "m@main")
    assert type(module.hidden.weight) is Scaled
    assert module.hidden.weight.is_leaf


def test_buffers_that_no_checkpoint_holds_are_said_to_be_left_on_meta(repo):
    lamella.torch.push(net(1), repo, "m@main")
    with torch.device("meta"):
        module = Net()
    with pytest.warns(UserWarning, match="'scratch'"):
        lamella.torch.load(module, repo, "m@main")
    assert module.scratch.is_meta
    assert not module.steps.is_meta


def test_a_tied_name_that_files_leave_out_is_not_missing(repo):
    state = net(1).state_dict()
    del state["head.weight"]
    lamella.torch.push(state, repo, "m@main")
    for module in (net(2), Net(device="meta")):
        assert lamella.torch.load(module, repo, "m@main") == ([], [])
        assert bits_of(module) == bits_of(net(1))
        assert module.head.weight is module.embed.weight


def test_tied_parameters_are_not_filled_with_two_contents(repo):
    state = dict(net(1).state_dict())
    state["head.weight"] = net(3).state_dict()["head.weight"]
    lamella.torch.push(state, repo, "m@main")
    for module in (net(2), Net(device="meta")):
        before = bits_of(module)
        with pytest.raises(InvalidInputError) as caught:
            lamella.torch.load(module, repo, "m@main")
        assert caught.value.kind == "tied_tensors"
        assert bits_of(module) == before


def renamed(state, old, new):
    return {new if name == old else name: tensor for name, tensor in state.items()}


def test_names_are_compared_before_anything_is_read(repo, monkeypatch):
    lamella.torch.push(renamed(net(1).state_dict(), "hidden.bias", "b"), repo, "m@main")
    monkeypatch.delattr(PackedStore, "read")
    module = net(2)
    with pytest.raises(InvalidInputError) as caught:
        lamella.torch.load(module, repo, "m@main")
    assert caught.value.kind == "structure_mismatch"
    assert caught.value.context == {"missing": 1, "unexpected": 1}
    assert "'hidden.bias'" in str(caught.value)
    assert "'b'" in str(caught.value)
    assert "strict=False" in str(caught.value)
    assert bits_of(module) == bits_of(net(2))


def test_without_strict_names_that_differ_are_returned(repo):
    lamella.torch.push(renamed(net(1).state_dict(), "hidden.bias", "b"), repo, "m@main")
    for module in (net(2), Net(device="meta")):
        bias = module.hidden.bias
        assert lamella.torch.load(module, repo, "m@main", strict=False) == (["hidden.bias"], ["b"])
        assert module.hidden.bias is bias
        assert bits_of({"w": module.hidden.weight}) == bits_of({"w": net(1).hidden.weight})


def test_include_and_exclude_restrict_both_sides(repo):
    lamella.torch.push(renamed(net(1).state_dict(), "hidden.bias", "b"), repo, "m@main")
    module = net(2)
    assert lamella.torch.load(module, repo, "m@main", include="embed.*") == ([], [])
    assert bits_of(module) == bits_of(net(2)) | {
        name: bits_of(net(1))[name] for name in ("embed.weight", "head.weight")
    }
    module = Net(device="meta")
    assert lamella.torch.load(module, repo, "m@main", exclude=["*bias", "b"]) == ([], [])
    assert module.hidden.bias.is_meta
    assert not module.hidden.weight.is_meta
    with pytest.raises(InvalidInputError, match=r"hidden\.bias"):
        lamella.torch.load(net(2), repo, "m@main", include="hidden.*")
    with pytest.raises(TensorNotFoundError, match="layer"):
        lamella.torch.load(net(2), repo, "m@main", include=["embed.*", "layer.*"])


def test_names_with_brackets_are_loaded_as_they_are(repo):
    module, other = nn.ParameterDict({"a[0]": torch.ones(20), "a0": torch.zeros(20)}), None
    lamella.torch.push(module, repo, "m@main")
    other = nn.ParameterDict({"a[0]": torch.zeros(20)})
    assert lamella.torch.load(other, repo, "m@main", strict=False) == ([], ["a0"])
    assert bits_of({"w": other["a[0]"]}) == bits_of({"w": torch.ones(20)})


@pytest.mark.parametrize("make", [
    lambda: net(2).to(torch.bfloat16), lambda: Net(torch.bfloat16, device="meta"), lambda: resized(net(2))
], ids=["dtype", "meta", "shape"])  # fmt: skip
@pytest.mark.parametrize("strict", [True, False])
def test_another_dtype_or_shape_is_refused_before_anything_changes(repo, make, strict):
    lamella.torch.push(net(1), repo, "m@main")
    module = make()
    before, parameters = bits_of(module), list(module.parameters())
    with pytest.raises(InvalidInputError, match=r"module\.to") as caught:
        lamella.torch.load(module, repo, "m@main", strict=strict)
    assert caught.value.kind == "structure_mismatch"
    assert bits_of(module) == before
    assert all(one is other for one, other in zip(module.parameters(), parameters, strict=True))


def resized(module):
    module.hidden = nn.Linear(16, 17)
    return module


def test_a_module_moves_between_versions_reading_only_what_changed():
    objects = CountingObjects(MemoryObjects())
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    first = lamella.torch.push(module, new_repository(objects), "m@main")
    with torch.no_grad():
        module[1].weight += torch.randn(300, 300) * 1e-4
    before = bits_of(module)
    lamella.torch.push(module, open_again(objects), "m@main")
    repo = open_again(objects)
    lamella.torch.load(module, repo, first.id)  # and the pages of both manifests are known
    repo.version("m@main").items()
    objects.reset()
    lamella.torch.load(module, repo, "m@main", have=first.id)
    assert bits_of(module) == before
    assert objects.read_nbytes < 0.75 * 300 * 300 * 4  # one delta; four tensors in full are twice the raw bytes
    with pytest.raises(InvalidInputError) as caught:
        lamella.torch.load(module, repo, "m@main", have=first.id)
    assert caught.value.kind == "not_held"


@pytest.mark.parametrize("state", [{0: {"exp_avg": "x"}}, 1, {7: {"step": torch.ones(1)}}])
def test_an_optimizer_that_cannot_take_a_state_keeps_its_own(repo, state):
    module = net(1)
    optimizer = torch.optim.AdamW(module.parameters())
    sum(weight.sum() for weight in module.parameters()).backward()
    optimizer.step()
    groups = optimizer.state_dict()["param_groups"] if isinstance(state, dict) and 0 in state else 2
    lamella.torch.push({"state": state, "param_groups": groups}, repo, "m@main")
    before = repr(optimizer.state_dict())
    with pytest.raises(InvalidInputError):
        lamella.torch.load(optimizer, repo, "m@main")
    assert repr(optimizer.state_dict()) == before


def test_a_wrapped_module_is_told_to_be_unwrapped(repo):
    lamella.torch.push(net(1), repo, "m@main")
    with pytest.raises(InvalidInputError, match=r"module\.module"):
        lamella.torch.load(nn.DataParallel(net(2)), repo, "m@main")


def test_what_is_taken_on_trust_is_checked_if_asked(repo):
    module = net(1)
    first = lamella.torch.push(module, repo, "m@main")
    lamella.torch.push(module, repo, "m@main", message="the same tensors")
    with torch.no_grad():
        next(module.parameters()).mul_(2)
    lamella.torch.load(module, repo, "m@main", have=first.id)
    with pytest.raises(InvalidInputError) as caught:
        lamella.torch.load(module, repo, "m@main", have=first.id, verify="chunk")
    assert caught.value.kind == "not_held"


def test_a_module_on_the_meta_device_holds_no_version(repo):
    lamella.torch.push(net(1), repo, "m@main")
    module = Net(device="meta")
    with pytest.raises(InvalidInputError) as caught:
        lamella.torch.load(module, repo, "m@main", have="m@main")
    assert caught.value.kind == "bad_option"
    assert module.embed.weight.is_meta


class Counting(nn.Module):
    """A module with state that is no tensor."""

    def __init__(self, state):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


@pytest.mark.parametrize("state", [
    {"seen": 3, "best": -float("inf")}, torch.arange(40), {"amax": torch.arange(40.0), "on": (True, None)}
], ids=["plain", "tensor", "nested"])  # fmt: skip
def test_extra_state_comes_back(repo, state):
    lamella.torch.push(nn.Sequential(Counting(state)), repo, "m@main")
    module = nn.Sequential(Counting(None if isinstance(state, dict) else torch.zeros(2)))
    assert lamella.torch.load(module, repo, "m@main") == ([], [])
    assert same(module[0].state, state)
    lamella.torch.push(nn.Sequential(nn.ModuleDict({"linear": nn.Linear(3, 3)})), repo, "m@main")
    with pytest.raises(InvalidInputError, match=r"0\._extra_state"):
        lamella.torch.load(module, repo, "m@main")


def test_a_module_whose_state_dict_gives_copies_is_refused(repo):
    module = nn.Linear(3, 3)
    module.register_state_dict_post_hook(lambda _, state, *rest: state.update(weight=state["weight"].clone()))
    lamella.torch.push(module, repo, "m@main")
    with pytest.raises(InvalidInputError) as caught:
        lamella.torch.load(module, repo, "m@main")
    assert caught.value.kind == "not_in_place"


def test_only_modules_and_optimizers_are_loaded_into(repo):
    lamella.torch.push(net(1), repo, "m@main")
    with pytest.raises(InvalidInputError, match=r"checkout\(revision, into=tensors\)"):
        lamella.torch.load(net(1).state_dict(), repo, "m@main")


# -- state dicts that are read when they are used ----------------------------------------------------------------------

CONFIG = BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=120,
    tie_word_embeddings=True,
)


def bert(cls, dtype, seed=0):
    torch.manual_seed(seed)
    return cls(CONFIG).to(dtype).eval()


@pytest.fixture
def read_names(monkeypatch):
    """Return the names of the tensors that are read, as they are."""
    names = []
    read = PackedStore.read

    def spied(self, id, cells, have=None):
        cells = list(cells)
        names.extend(cell.tensor for cell in cells)
        return read(self, id, cells, have)

    monkeypatch.setattr(PackedStore, "read", spied)
    return names


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}], ids=["default", "auto"])
def test_transformers_loads_a_version_without_a_file(repo, cls, dtype, options, read_names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pushed = bert(cls, dtype)
    version = lamella.torch.push(pushed, repo, "bert@main")
    loaded = cls.from_pretrained(None, config=CONFIG, state_dict=version.state_dict(), **options).eval()
    assert bits_of(loaded) == bits_of(pushed)
    tokens = torch.tensor([[2, 7, 99, 3]])
    assert bits_of({"y": loaded(tokens)[0]}) == bits_of({"y": pushed(tokens)[0]})
    assert len(read_names) == len(set(read_names))
    assert list(tmp_path.iterdir()) == []


def test_transformers_reads_the_tensors_alone_that_it_needs(repo, read_names):
    version = lamella.torch.push(bert(BertForMaskedLM, torch.float32), repo, "bert@main")
    loaded = BertModel.from_pretrained(None, config=CONFIG, state_dict=version.state_dict(), add_pooling_layer=False)
    assert len(read_names) == len(loaded.state_dict()) < len(version)
    assert not [name for name in read_names if name.startswith("cls.")]


def test_a_lazy_slice_gives_what_safetensors_gives(repo, tmp_path):
    tensors = {
        "rows": torch.randn(2_000, 700).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "bytes": torch.arange(12, dtype=torch.uint8).reshape(3, 4),
        "float8": torch.randn(40, 3).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    lazy = repo.push(tensors, "m@main").state_dict()
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        for name in tensors:
            ours, theirs = lazy[name], file.get_slice(name)
            assert (ours.get_shape(), ours.get_dtype()) == (theirs.get_shape(), theirs.get_dtype())
            assert (ours.dtype, ours.is_floating_point()) == (tensors[name].dtype, tensors[name].is_floating_point())
            assert bits_of({"": ours[...]}) == bits_of({"": tensors[name]})
            keys = (slice(1, 3), (slice(None), slice(0, 2)), (1, slice(0, 3)), (..., slice(1, 2)))
            for key in keys if tensors[name].dim() else ():
                assert bits_of({"": ours[key]}) == bits_of({"": tensors[name][key]}) == bits_of({"": theirs[key]})


def test_a_lazy_slice_reads_the_chunks_alone_that_hold_it(repo, read_names):
    wide = torch.randn(3_000, 400)
    lazy = repo.push({"w": wide}, "m@main").state_dict()
    assert bits_of({"": lazy["w"][2_100:2_103]}) == bits_of({"": wide[2_100:2_103]})
    assert read_names == ["w"]


# -- optimizers and nested states --------------------------------------------------------------------------------------


def same(one, other):
    """Whether two states are equal in types, order, and bits."""
    if type(one) is not type(other):
        return False
    match one:
        case dict():
            return list(map(repr, one)) == list(map(repr, other)) and all(same(one[key], other[key]) for key in one)
        case list() | tuple():
            return len(one) == len(other) and all(map(same, one, other))
        case torch.Tensor():
            return bits_of({"": one}) == bits_of({"": other})
        case np.ndarray():
            return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        case float():
            return np.float64(one).tobytes() == np.float64(other).tobytes()
    return one == other


def stepped(make, seed=0, steps=2):
    """Return a module and an optimizer that has worked on it."""
    module = net(seed)
    optimizer = make(module.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        module(TOKENS).square().sum().backward()
        optimizer.step()
    return module, optimizer


OPTIMIZERS = [
    lambda parameters: torch.optim.AdamW(parameters, lr=0.01, betas=(0.8, 0.95)),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=["adamw", "sgd", "momentum"])
def test_training_goes_on_from_a_pushed_optimizer_bit_by_bit(repo, make):
    module, optimizer = stepped(make)
    lamella.torch.push(module, repo, "model@main")
    lamella.torch.push(optimizer, repo, "optimizer@main")
    other, resumed = stepped(make, seed=5, steps=1)
    lamella.torch.load(other, repo, "model@main")
    assert lamella.torch.load(resumed, repo, "optimizer@main") == ([], [])
    assert same(resumed.state_dict(), optimizer.state_dict())
    for one, trained in ((optimizer, module), (resumed, other)):
        one.zero_grad()
        trained(TOKENS).square().sum().backward()
        one.step()
    assert bits_of(other) == bits_of(module)


def test_an_optimizer_of_other_parameters_is_refused(repo):
    _, optimizer = stepped(OPTIMIZERS[0])
    lamella.torch.push(optimizer, repo, "o@main")
    lamella.torch.push(net(1), repo, "m@main")
    other = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    for revision in ("o@main", "m@main"):
        with pytest.raises(InvalidInputError) as caught:
            lamella.torch.load(other, repo, revision)
        assert caught.value.kind == "structure_mismatch"
    with pytest.raises(InvalidInputError, match="whole"):
        lamella.torch.load(other, repo, "o@main", include="state.*")
    assert not other.state


STATE = {
    "model": {"w": torch.arange(20.0), "b": torch.tensor(-0.0)},
    0: [1, -(2**70), True, None, "\u00e9", "", [], {}, ()],
    "0": (float("nan"), float("inf"), -float("inf"), -0.0, 1e-310, (torch.ones(9, dtype=torch.bfloat16),)),
    "random": ("MT19937", np.arange(624, dtype=np.uint32), 624, 0, 0.0),
    "keys": {1: "one", "1": torch.zeros(0, 3), -7: {"a.b": 1, "": 2}},
    "dollars": {"$tensor": "model.w", "$dict": [[1, 2]], "plain": {"$float": 1.5}},
    "array": np.arange(12, dtype=np.float16).reshape(3, 4).astype("bfloat16"),
}


def test_a_nested_state_comes_back_as_it_was(repo):
    version = lamella.torch.push(STATE, repo, "run@main", files={"notes.txt": b"hello"})
    assert same(lamella.torch.state(repo, "run@main"), STATE)
    assert sorted(version) == ["0.5.0", "array", "keys.1", "model.b", "model.w", "random.1"]
    assert set(version.files) == {"notes.txt", lamella.torch.STATE_FILE}
    assert b"pickle" not in version.file(lamella.torch.STATE_FILE)


@pytest.mark.parametrize(
    "state", [[torch.ones(2)], ({"a": 1},), {"only": 1.5}, {"a": {"b": torch.ones(3)}}, {0: torch.ones(2)}]
)
def test_a_small_state_comes_back_as_it_was(repo, state):
    lamella.torch.push(state, repo, "run@main")
    assert same(lamella.torch.state(repo, "run@main"), state)


def test_tensors_by_name_need_no_file_and_come_back_by_name(repo):
    state = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float8_e5m2)}
    assert lamella.torch.push(state, repo, "m@main").files == ()
    assert bits_of(lamella.torch.state(repo, "m@main")) == bits_of(state)


def nested(depth):
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(("state", "path", "kind"), [
    ({"a": [1, {"b": {1, 2}}]}, "a.1.b", "not_storable"),
    ({"a": {"b": b"bytes"}}, "a.b", "not_storable"),
    ({"a": torch.float32}, "a", "not_storable"),
    ({"a": {(1, 2): 3}}, "a", "not_storable"),
    ({"a": {True: 3}}, "a", "not_storable"),
    ({"a": "\ud800"}, "JSON", "not_storable"),
    ({"a": 10**5_000}, "JSON", "not_storable"),
    ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "a.b", "ambiguous_name"),
    (nested(60), "deeper", "too_deep"),
    (torch.ones(1), "Tensor", "bad_source"),
    ({"a": {"b": torch.ones(1, device="meta")}}, "a.b", "meta_tensor"),
])  # fmt: skip
def test_what_cannot_be_stored_is_named(repo, state, path, kind):
    with pytest.raises(InvalidInputError) as caught:
        lamella.torch.push(state, repo, "run@main")
    assert caught.value.kind == kind
    assert path in str(caught.value)
    assert repo.models() == []


def test_the_name_of_the_state_file_is_taken(repo):
    with pytest.raises(InvalidInputError, match=r"state\.json"):
        lamella.torch.push({"a": 1}, repo, "run@main", files={"state.json": b""})
    lamella.torch.push({"a": torch.ones(3)}, repo, "run@main", files={"state.json": b'{"a": 1}'})
    assert bits_of(lamella.torch.state(repo, "run@main")) == bits_of({"a": torch.ones(3)})


@pytest.mark.parametrize("node", [
    '{"$tensor": "b"}', '{"$array": "b"}', '{"$tensor": []}', '{"$float": "x"}', '{"$tuple": 1}', '{"$dict": [[1]]}',
    '{"$dict": [[[], 1]]}', "[" * 300 + "]" * 300,
], ids=lambda node: node[:20])  # fmt: skip
def test_a_state_file_that_lies_is_damage(repo, node):
    data = f'{{"lamella state": 0, "state": {node}}}'.encode()
    repo.push({"a": np.ones(3)}, "run@main", files={"state.json": data})
    with pytest.raises(CorruptionError) as caught:
        lamella.torch.state(repo, "run@main")
    assert caught.value.kind == "bad_state"


def test_import_lamella_does_not_import_torch_and_lamella_torch_does():
    before, after = "import sys, lamella; assert 'torch' not in sys.modules", "import lamella.torch, torch; torch.nn"
    subprocess.run([sys.executable, "-c", f"{before}; {after}"], check=True, timeout=60)
