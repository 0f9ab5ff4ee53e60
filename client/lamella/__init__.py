"""Version control for neural-network weights.

>>> import lamella, numpy as np
>>> repo = lamella.init("memory://docs")
>>> version = repo.push({"w": np.zeros((2, 3), np.float32)}, "demo@main", message="first")
>>> version["w"][0, :2]
array([0., 0.], dtype=float32)
"""

from lamella_engine.auditing import Act, NotedRead
from lamella_engine.background import PushHandle
from lamella_engine.cost import Cost
from lamella_engine.distance import Distance
from lamella_engine.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptionError,
    InvalidInputError,
    LamellaError,
    LimitError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    RefNotFoundError,
    RepositoryNotFoundError,
    StorageError,
    TensorNotFoundError,
    UnsupportedFormatError,
    VersionNotFoundError,
)
from lamella_engine.jobs import Diff, Stats
from lamella_engine.maintenance import Problem, Verification
from lamella_engine.model import Progress, RefInfo
from lamella_engine.opening import init
from lamella_engine.opening import open_repository as open
from lamella_engine.repository import Repository
from lamella_engine.transaction import Transaction
from lamella_engine.versions import LazySlice, LazyTensor, Version

__all__ = [
    "Act",
    "AlreadyExistsError",
    "ConflictError",
    "CorruptionError",
    "Cost",
    "Diff",
    "Distance",
    "InvalidInputError",
    "LamellaError",
    "LazySlice",
    "LazyTensor",
    "LimitError",
    "NotFoundError",
    "NotedRead",
    "OutcomeUnknownError",
    "PermissionDeniedError",
    "Problem",
    "Progress",
    "PushHandle",
    "RefInfo",
    "RefNotFoundError",
    "Repository",
    "RepositoryNotFoundError",
    "Stats",
    "StorageError",
    "TensorNotFoundError",
    "Transaction",
    "UnsupportedFormatError",
    "Verification",
    "Version",
    "VersionNotFoundError",
    "init",
    "open",
]
