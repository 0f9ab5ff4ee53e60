"""Modules, optimizers and nested states as versions, and versions back into them.

A state that is more than tensors by name is kept as its tensors, each named by its path (``state.0.exp_avg``), and one
file of JSON, :data:`STATE_FILE`, which holds the rest. A list there is a list, an object a dict; what JSON lacks is an
object of one key: ``{"$tensor": name}``, ``{"$array": name}`` (NumPy's), ``{"$float": "nan"}`` (``"inf"``, ``"-inf"``),
``{"$tuple": [...]}``, and ``{"$dict": [[key, value], ...]}`` for keys that are not strings or begin with ``$``.
Nothing is pickled.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from glob import escape
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from lamella_engine.background import PushHandle
from lamella_engine.errors import CorruptionError, InvalidInputError, TensorNotFoundError
from lamella_engine.model import Progress
from lamella_engine.reading import Patterns, Selection, select
from lamella_engine.repository import Repository
from lamella_engine.torch_tensors import memory_of
from lamella_engine.versions import Version

STATE_FILE = "state.json"
"""The file, kept with a version, that holds what of a nested state is no tensor."""

_MARK = "lamella state"
_STATE_FORMAT = 0

# Deepest nesting of a state, far beyond any; and of what stands for it in the file, where a dict may take three levels.
# Both are far below Python's own limit.
_MAX_DEPTH = 50
_MAX_NODE_DEPTH = 4 * _MAX_DEPTH

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class IncompatibleKeys(NamedTuple):
    """Names that only one side has, sorted."""

    missing: list[str]
    """In the module, not in the version; these tensors were left as they are."""
    unexpected: list[str]
    """In the version, not in the module."""


@overload
def push(
    state: "torch.nn.Module | torch.optim.Optimizer | Mapping[Any, Any] | list[Any] | tuple[Any, ...]",
    repo: Repository,
    target: str,
    *,
    message: str = "",
    parent: str | None = None,
    metrics: Mapping[str, float] | None = None,
    recipe: Any = None,
    files: Mapping[str, bytes] | None = None,
    progress: Callable[[Progress], None] | None = None,
    wait: Literal[True] = True,
) -> Version: ...


@overload
def push(
    state: "torch.nn.Module | torch.optim.Optimizer | Mapping[Any, Any] | list[Any] | tuple[Any, ...]",
    repo: Repository,
    target: str,
    *,
    message: str = "",
    parent: str | None = None,
    metrics: Mapping[str, float] | None = None,
    recipe: Any = None,
    files: Mapping[str, bytes] | None = None,
    progress: Callable[[Progress], None] | None = None,
    wait: Literal[False],
) -> PushHandle: ...


def push(
    state: "torch.nn.Module | torch.optim.Optimizer | Mapping[Any, Any] | list[Any] | tuple[Any, ...]",
    repo: Repository,
    target: str,
    *,
    message: str = "",
    parent: str | None = None,
    metrics: Mapping[str, float] | None = None,
    recipe: Any = None,
    files: Mapping[str, bytes] | None = None,
    progress: Callable[[Progress], None] | None = None,
    wait: bool = True,
) -> Version | PushHandle:
    """Store a module, an optimizer or any nested state as a new version at the tip of a branch.

    Parameters
    ----------
    state
        A module or an optimizer, whose ``state_dict()`` is stored; or dicts (keys: str or int), lists and tuples, in
        one another, of torch tensors, NumPy arrays, numbers, text, bools and None. Tensors by name alone make the same
        version as :meth:`Repository.push <lamella.Repository.push>` of them.
    target, message, parent, metrics, recipe, files, progress, wait
        As :meth:`Repository.push <lamella.Repository.push>` takes them.

    Raises
    ------
    InvalidInputError
        A value is none of these (``not_storable``), or two paths read alike (``ambiguous_name``): the message names it.
        And what :meth:`Repository.push <lamella.Repository.push>` raises.
    """
    tensors, document = flatten(
        state.state_dict() if isinstance(state, torch.nn.Module | torch.optim.Optimizer) else state
    )
    if document is not None:
        if files and STATE_FILE in files:
            raise InvalidInputError(f"{STATE_FILE!r} is taken by the state: rename the file", kind="duplicate_path")
        files = {**(files or {}), STATE_FILE: document}
    push: Callable[..., Version | PushHandle] = repo.push
    return push(
        tensors,
        target,
        message=message,
        parent=parent,
        metrics=metrics,
        recipe=recipe,
        files=files,
        progress=progress,
        wait=wait,
    )


def state(repo: Repository, revision: str) -> Any:
    """Return the state that was pushed: equal in structure, types of keys, and every bit of tensors.

    Containers are dict, list and tuple; those made of them, such as a namedtuple, come back as what they are made of.

    A version that was pushed otherwise gives its tensors by name. Tensors come in the CPU's memory, each in its own.

    Raises CorruptionError (``bad_state``) if the state's file does not fit the version's tensors.
    """
    version = repo.version(revision)
    root = document_of(version)
    arrays = [name for name in names_in(root, "$array") if name in version]
    found = repo.checkout(version.id, framework="torch", exclude=[escape(name) for name in arrays])
    return found if root is None else rebuilt(root, found | {name: version[name].numpy() for name in arrays})


def load(
    target: "torch.nn.Module | torch.optim.Optimizer",
    repo: Repository,
    revision: str,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    strict: bool = True,
    have: str | None = None,
    verify: Literal["blob", "chunk"] = "blob",
    device: "torch.device | str | None" = None,
) -> IncompatibleKeys:
    """Fill a module's parameters and buffers with those of a version, in place; or an optimizer's state.

    A tensor is decoded straight into the memory of its parameter, wherever that lies: there is no second copy of the
    model. Tied parameters stay tied, and a name that the version lacks is not missing if it is tied to one that it has.

    Parameters
    ----------
    target
        A module, which may lie on the meta device in whole or in part; or an optimizer, which is loaded whole, as by
        ``load_state_dict``.
    revision
        Which version.
    include, exclude
        Globs over names. What they leave out is neither looked for in the version nor touched in the module.
    strict
        Whether names must agree; otherwise those that do are loaded.
    have
        A revision that the module holds: only what changed since is read, and checked against what is there. That
        the rest is as it was is taken on trust.
    verify
        ``"chunk"`` computes the id of every cell again, of those too that ``have`` says are there.
    device
        Where tensors that are on the meta device shall be; the CPU by default. They become new parameters of the same
        class and ``requires_grad``, so an optimizer must be made afterwards.

    Returns
    -------
    IncompatibleKeys
        Names that only one side has; none if ``strict``.

    Raises
    ------
    InvalidInputError
        Nothing has been read and nothing changed: ``structure_mismatch`` (names differ and ``strict``, or a dtype or
        shape), ``tied_tensors``, ``not_in_place`` (``state_dict()`` gives copies), ``bad_option``, or what a tensor
        cannot be filled for. Or ``not_held``: the module does not hold ``have``, and may have moved in part.
    TensorNotFoundError
        A pattern of ``include`` matches nothing, in the version and in the module.

    Warns
    -----
    UserWarning
        Buffers are left on the meta device. Those that are not persistent are in no checkpoint, so a module that was
        made there has to compute them again: make it with real buffers (``torch.device("meta")`` around parameters
        alone), set them afterwards, or let transformers do both: ``from_pretrained(None, config=config,
        state_dict=version.state_dict())``.
    """
    if isinstance(target, torch.optim.Optimizer):
        if not (
            include is None and exclude is None and strict and have is None and device is None and verify == "blob"
        ):
            raise InvalidInputError("an optimizer is loaded whole: give a revision only", kind="bad_option")
        return _load_optimizer(target, repo, revision)
    if not isinstance(target, torch.nn.Module):
        raise InvalidInputError(
            f"a {type(target).__name__} is neither module nor optimizer: write load(module, repo, revision), or for "
            "tensors repo.checkout(revision, into=tensors)",
            kind="bad_source",
        )
    version = repo.version(revision)
    filling = _ModuleFilling(target, version, select(include, exclude))
    keys = filling.compare()
    if strict and (keys.missing or keys.unexpected):
        raise _names_differ(keys)
    filling.fill(repo, have=have, verify=verify, device=device)
    return keys


def _load_optimizer(optimizer: torch.optim.Optimizer, repo: Repository, revision: str) -> IncompatibleKeys:
    found = state(repo, revision)
    if not isinstance(found, dict) or not {"state", "param_groups"} <= found.keys():
        raise InvalidInputError(
            f"{revision} is not the state of an optimizer: load it into a module", kind="structure_mismatch"
        )
    before = optimizer.state_dict()
    try:
        optimizer.load_state_dict(found)
    except Exception as error:  # whatever torch makes of a state that is none of its own
        optimizer.load_state_dict(before)
        raise InvalidInputError(
            f"{revision} is of another optimizer: make one over the same parameters ({error})",
            kind="structure_mismatch",
        ) from None
    return IncompatibleKeys([], [])


# What DataParallel and torch.compile put before every name.
_WRAPPED = ("module.", "_orig_mod.")


def _names_differ(keys: IncompatibleKeys) -> InvalidInputError:
    parts = []
    if keys.missing:
        parts.append(f"the version lacks {_few(keys.missing)} of the module")
    if keys.unexpected:
        parts.append(f"the module lacks {_few(keys.unexpected)} of the version")
    advice = "load with strict=False, or select names with include and exclude"
    if any(all(name.startswith(prefix) for name in keys.missing) for prefix in _WRAPPED if keys.missing):
        advice = "load into the module that is wrapped (module.module, or module._orig_mod)"
    return InvalidInputError(
        f"{', and '.join(parts)}: {advice}",
        kind="structure_mismatch",
        missing=len(keys.missing),
        unexpected=len(keys.unexpected),
    )


def _few(names: list[str]) -> str:
    shown = ", ".join(repr(name[:80]) for name in names[:3])
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({shown}{', ...' if len(names) > 3 else ''})"


class _ModuleFilling:
    """One module and what of a version goes into it."""

    def __init__(self, module: torch.nn.Module, version: Version, selection: Selection) -> None:
        self._module = module
        self._version = version
        own = {id(tensor) for _, tensor in _named_tensors(module)}
        state = module.state_dict(keep_vars=True)
        # Not memory to be filled: a module gives and takes its extra state as a value.
        self._extra = {name: part for name, part in _extra_states(module) if name in state and selection.has(name)}
        self._tensors: dict[str, torch.Tensor] = {}
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or name in self._extra or not selection.has(name):
                continue
            if id(value) not in own:
                raise InvalidInputError(
                    f"the module's state_dict() gives a copy of {name[:80]!r}, which cannot be filled: give "
                    "load_state_dict what lamella.torch.state returns",
                    kind="not_in_place",
                    tensor=name,
                )
            self._tensors[name] = value
        self._non_persistent = [name for name, _ in module.named_buffers(remove_duplicate=False) if name not in state]
        self._stored = {name for name in version if selection.has(name)}
        for pattern in selection.include or ():
            if not any(map(select(pattern).has, (*self._stored, *self._tensors, *self._extra))):
                raise TensorNotFoundError(
                    f"no tensor of the version or the module matches {pattern!r}: see show for the names",
                    pattern=pattern,
                )
        self._nodes = (document_of(version) or {}) if self._extra else {}

    def compare(self) -> IncompatibleKeys:
        """Return the selected names that only one side has."""
        there = {_memory_of(tensor) for name, tensor in self._tensors.items() if name in self._stored}
        missing = [name for name, tensor in self._tensors.items() if _memory_of(tensor) not in there]
        missing += [name for name in self._extra if name not in self._stored and name not in self._nodes]
        within = tuple(f"{name}." for name in self._extra)
        surplus = self._stored - self._tensors.keys() - self._extra.keys()
        return IncompatibleKeys(sorted(missing), sorted(name for name in surplus if not name.startswith(within)))

    def fill(
        self,
        repo: Repository,
        *,
        have: str | None,
        verify: Literal["blob", "chunk"],
        device: "torch.device | str | None",
    ) -> None:
        """Fill what both sides have, then replace what was on the meta device."""
        wanted = {name: tensor for name, tensor in self._tensors.items() if name in self._stored}
        fresh: dict[int, torch.Tensor] = {}
        for tensor in wanted.values():
            if tensor.is_meta and not is_lazy(tensor) and id(tensor) not in fresh:
                fresh[id(tensor)] = _materialized(tensor, device)
        if fresh and have is not None:
            raise InvalidInputError(
                "a module on the meta device holds no version: load without have", kind="bad_option"
            )
        into = {name: fresh.get(id(tensor), tensor) for name, tensor in wanted.items()}
        include = None if len(into) == len(self._version) else [escape(name) for name in into]
        repo.checkout(self._version.id, into=into, have=have, include=include, verify=verify)
        for part in self._module.modules():
            for name, tensor in list(_named_tensors(part, recurse=False)):
                if id(tensor) in fresh:
                    setattr(part, name, fresh[id(tensor)])
        for name, part in self._extra.items():
            node = self._nodes.get(name, {"$tensor": name})
            found: dict[str, Any] = {leaf: self._version[leaf].torch() for leaf in names_in(node, "$tensor")}
            found |= {leaf: self._version[leaf].numpy() for leaf in names_in(node, "$array")}
            if found or name in self._nodes:
                part.set_extra_state(rebuilt(node, found))
        buffers = dict(self._module.named_buffers(remove_duplicate=False))
        left = [name for name in self._non_persistent if buffers[name].is_meta]
        if fresh and left:
            warnings.warn(
                f"{_few(left)} are left on the meta device: they are buffers that no checkpoint holds, so compute them "
                "again before the module is used",
                stacklevel=3,
            )


def _named_tensors(module: torch.nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and buffer by each of its names."""
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=False)


def _extra_states(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield every submodule that has extra state, by the name of that in the state dict."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        if type(part).get_extra_state is not torch.nn.Module.get_extra_state:
            yield f"{prefix}._extra_state".removeprefix("."), part


def _memory_of(tensor: torch.Tensor) -> object:
    """Return what is equal for tied tensors: one object, or views of one memory that are alike."""
    if tensor.is_meta or is_lazy(tensor) or not tensor.numel():
        return id(tensor)
    return memory_of(tensor)


def _materialized(tensor: torch.Tensor, device: "torch.device | str | None") -> torch.Tensor:
    """Return a tensor like one on the meta device, with memory: of its class, with its attributes."""
    with torch.no_grad():
        memory = torch.empty_like(tensor.detach(), device=torch.device("cpu") if device is None else device)
    made = memory.as_subclass(type(tensor)).requires_grad_(tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)
    return made


# -- nested states -----------------------------------------------------------------------------------------------------


def flatten(state: Any) -> tuple[dict[str, Any], bytes | None]:
    """Return a state's tensors by name, and the file that holds the rest; None if that is nothing."""
    if not isinstance(state, Mapping | list | tuple):
        raise InvalidInputError(
            f"a {type(state).__name__} is no state: give a module, an optimizer, or dicts and lists of tensors",
            kind="bad_source",
        )
    if isinstance(state, Mapping) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        return dict(state), None
    tensors: dict[str, Any] = {}
    node = node_of(state, (), tensors)
    try:
        text = json.dumps({_MARK: _STATE_FORMAT, "state": node}, ensure_ascii=False, allow_nan=False)
        return tensors, text.encode()
    except ValueError as error:  # half a surrogate, or an integer of thousands of digits
        raise InvalidInputError(f"the state holds what JSON cannot: {error}", kind="not_storable") from None


def node_of(value: Any, path: tuple[str, ...], tensors: dict[str, Any]) -> Any:
    """Return what stands for a value in the file; enter tensors into ``tensors``."""
    if len(path) > _MAX_DEPTH:
        raise InvalidInputError(f"the state is nested deeper than {_MAX_DEPTH} levels: flatten it", kind="too_deep")

    def inner(items: Iterable[tuple[Any, Any]]) -> list[Any]:
        return [node_of(item, (*path, str(key)), tensors) for key, item in items]

    match value:
        case torch.Tensor() | np.ndarray():
            name = ".".join(path)
            if name in tensors:
                raise InvalidInputError(
                    f"two tensors of the state have the path {name[:80]!r}: rename a key", kind="ambiguous_name"
                )
            tensors[name] = value
            return {"$tensor" if isinstance(value, torch.Tensor) else "$array": name}
        case None | bool() | str() | int():
            return value
        case float():
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        case list():
            return inner(enumerate(value))
        case tuple():
            return {"$tuple": inner(enumerate(value))}
        case Mapping():
            for key in value:
                if not isinstance(key, str | int) or isinstance(key, bool):
                    raise _not_storable(path, f"has the key {key!r:.80}, a {type(key).__name__}", "use str or int")
            nodes = inner(value.items())
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return dict(zip(value, nodes, strict=True))
            return {"$dict": [[key, node] for key, node in zip(value, nodes, strict=True)]}
    raise _not_storable(path, f"is a {type(value).__name__}", "make it of tensors, numbers, text, lists and dicts")


def _not_storable(path: tuple[str, ...], problem: str, remedy: str) -> InvalidInputError:
    name = ".".join(path)
    return InvalidInputError(f"{name[:200]!r} of the state {problem}: {remedy}", kind="not_storable", path=name)


def document_of(version: Version) -> Any:
    """Return what stands in a version's state file, or None if it has none that a push of a state wrote."""
    if STATE_FILE not in version.files:
        return None
    try:
        parsed = json.loads(version.file(STATE_FILE))
    except (ValueError, RecursionError):
        return None
    if not isinstance(parsed, dict) or parsed.get(_MARK) != _STATE_FORMAT or "state" not in parsed:
        return None
    return parsed["state"]


def names_in(node: Any, kind: str, depth: int = _MAX_NODE_DEPTH) -> Iterator[str]:
    """Yield the names of the tensors, or of the arrays, that a node holds; raises CorruptionError if it is too deep."""
    if depth == 0:
        raise CorruptionError(f"{STATE_FILE} is nested deeper than any state", kind="bad_state")
    if isinstance(node, dict) and list(node) == [kind]:
        yield str(node[kind])
    elif isinstance(node, dict | list):
        for item in node.values() if isinstance(node, dict) else node:
            yield from names_in(item, kind, depth - 1)


def rebuilt(node: Any, found: Mapping[str, Any]) -> Any:
    """Return the value that a node stands for, given its tensors and arrays; raises CorruptionError."""
    try:
        return _value(node, found)
    except (LookupError, TypeError, ValueError):
        raise CorruptionError(f"{STATE_FILE} does not fit the tensors of its version", kind="bad_state") from None


def _value(node: Any, found: Mapping[str, Any]) -> Any:
    match node:
        case {"$tensor": name, **rest} | {"$array": name, **rest} if not rest:
            return found[name]
        case {"$float": text, **rest} if not rest:
            return _NON_FINITE[text]
        case {"$tuple": items, **rest} if not rest:
            return tuple(_value(item, found) for item in items)
        case {"$dict": items, **rest} if not rest:
            return {key: _value(item, found) for key, item in items}
        case dict():
            return {key: _value(item, found) for key, item in node.items()}
        case list():
            return [_value(item, found) for item in node]
    return node
