from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Raw(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CreateRequest(_message.Message):
    __slots__ = ("repository", "max_depth")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    MAX_DEPTH_FIELD_NUMBER: _ClassVar[int]
    repository: str
    max_depth: int
    def __init__(self, repository: _Optional[str] = ..., max_depth: _Optional[int] = ...) -> None: ...

class RepositoryRequest(_message.Message):
    __slots__ = ("repository",)
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    repository: str
    def __init__(self, repository: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("repository", "seen")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    repository: str
    seen: int
    def __init__(self, repository: _Optional[str] = ..., seen: _Optional[int] = ...) -> None: ...

class RepositoryInfo(_message.Message):
    __slots__ = ("id", "max_depth", "head", "head_digest", "seen_digest", "grants")
    ID_FIELD_NUMBER: _ClassVar[int]
    MAX_DEPTH_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEEN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    max_depth: int
    head: int
    head_digest: bytes
    seen_digest: bytes
    grants: bool
    def __init__(self, id: _Optional[str] = ..., max_depth: _Optional[int] = ..., head: _Optional[int] = ..., head_digest: _Optional[bytes] = ..., seen_digest: _Optional[bytes] = ..., grants: bool = ...) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("models", "versions", "packs", "decoded_nbytes", "stored_nbytes")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    PACKS_FIELD_NUMBER: _ClassVar[int]
    DECODED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    models: int
    versions: int
    packs: int
    decoded_nbytes: int
    stored_nbytes: int
    def __init__(self, models: _Optional[int] = ..., versions: _Optional[int] = ..., packs: _Optional[int] = ..., decoded_nbytes: _Optional[int] = ..., stored_nbytes: _Optional[int] = ...) -> None: ...

class ResolveRequest(_message.Message):
    __slots__ = ("repository", "revision")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    repository: str
    revision: str
    def __init__(self, repository: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class VersionRequest(_message.Message):
    __slots__ = ("repository", "id")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    repository: str
    id: str
    def __init__(self, repository: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class Version(_message.Message):
    __slots__ = ("description", "model", "number", "parents")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    description: bytes
    model: str
    number: int
    parents: _containers.RepeatedCompositeFieldContainer[Parent]
    def __init__(self, description: _Optional[bytes] = ..., model: _Optional[str] = ..., number: _Optional[int] = ..., parents: _Optional[_Iterable[_Union[Parent, _Mapping]]] = ...) -> None: ...

class Parent(_message.Message):
    __slots__ = ("id", "model", "number")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    number: int
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class ModelsReply(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, models: _Optional[_Iterable[str]] = ...) -> None: ...

class RefsRequest(_message.Message):
    __slots__ = ("repository", "model")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    repository: str
    model: str
    def __init__(self, repository: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class RefsReply(_message.Message):
    __slots__ = ("refs",)
    REFS_FIELD_NUMBER: _ClassVar[int]
    refs: _containers.RepeatedCompositeFieldContainer[Ref]
    def __init__(self, refs: _Optional[_Iterable[_Union[Ref, _Mapping]]] = ...) -> None: ...

class Ref(_message.Message):
    __slots__ = ("name", "kind", "number")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    number: int
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class UpdateRefsRequest(_message.Message):
    __slots__ = ("repository", "updates")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    repository: str
    updates: _containers.RepeatedCompositeFieldContainer[RefUpdate]
    def __init__(self, repository: _Optional[str] = ..., updates: _Optional[_Iterable[_Union[RefUpdate, _Mapping]]] = ...) -> None: ...

class RefUpdate(_message.Message):
    __slots__ = ("model", "name", "kind", "number")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    model: str
    name: str
    kind: str
    number: int
    def __init__(self, model: _Optional[str] = ..., name: _Optional[str] = ..., kind: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("repository", "model", "ref", "after")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REF_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    repository: str
    model: str
    ref: str
    after: int
    def __init__(self, repository: _Optional[str] = ..., model: _Optional[str] = ..., ref: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("repository", "version", "have", "cells")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    CELLS_FIELD_NUMBER: _ClassVar[int]
    repository: str
    version: str
    have: str
    cells: _containers.RepeatedCompositeFieldContainer[CellRun]
    def __init__(self, repository: _Optional[str] = ..., version: _Optional[str] = ..., have: _Optional[str] = ..., cells: _Optional[_Iterable[_Union[CellRun, _Mapping]]] = ...) -> None: ...

class CellRun(_message.Message):
    __slots__ = ("tensor", "first", "count", "held")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    tensor: str
    first: int
    count: int
    held: bytes
    def __init__(self, tensor: _Optional[str] = ..., first: _Optional[int] = ..., count: _Optional[int] = ..., held: _Optional[bytes] = ...) -> None: ...

class LocateReply(_message.Message):
    __slots__ = ("chains",)
    CHAINS_FIELD_NUMBER: _ClassVar[int]
    chains: _containers.RepeatedCompositeFieldContainer[Chain]
    def __init__(self, chains: _Optional[_Iterable[_Union[Chain, _Mapping]]] = ...) -> None: ...

class Chain(_message.Message):
    __slots__ = ("blobs",)
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    blobs: _containers.RepeatedCompositeFieldContainer[StoredBlob]
    def __init__(self, blobs: _Optional[_Iterable[_Union[StoredBlob, _Mapping]]] = ...) -> None: ...

class StoredBlob(_message.Message):
    __slots__ = ("chunk", "decoded_nbytes", "encoded_nbytes")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    DECODED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    ENCODED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    decoded_nbytes: int
    encoded_nbytes: int
    def __init__(self, chunk: _Optional[bytes] = ..., decoded_nbytes: _Optional[int] = ..., encoded_nbytes: _Optional[int] = ...) -> None: ...

class BeginRequest(_message.Message):
    __slots__ = ("repository", "push", "model", "branch", "parent", "again", "part")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    repository: str
    push: str
    model: str
    branch: str
    parent: str
    again: bool
    part: bool
    def __init__(self, repository: _Optional[str] = ..., push: _Optional[str] = ..., model: _Optional[str] = ..., branch: _Optional[str] = ..., parent: _Optional[str] = ..., again: bool = ..., part: bool = ...) -> None: ...

class BeginReply(_message.Message):
    __slots__ = ("parents", "taken")
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    parents: _containers.RepeatedCompositeFieldContainer[Parent]
    taken: int
    def __init__(self, parents: _Optional[_Iterable[_Union[Parent, _Mapping]]] = ..., taken: _Optional[int] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("repository", "push")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    repository: str
    push: str
    def __init__(self, repository: _Optional[str] = ..., push: _Optional[str] = ...) -> None: ...

class ConsiderRequest(_message.Message):
    __slots__ = ("repository", "push", "pages", "lanes")
    class LanesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: bytes
        def __init__(self, key: _Optional[int] = ..., value: _Optional[bytes] = ...) -> None: ...
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    repository: str
    push: str
    pages: _containers.RepeatedScalarFieldContainer[bytes]
    lanes: _containers.ScalarMap[int, bytes]
    def __init__(self, repository: _Optional[str] = ..., push: _Optional[str] = ..., pages: _Optional[_Iterable[bytes]] = ..., lanes: _Optional[_Mapping[int, bytes]] = ...) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("repository", "push", "first", "cells")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    CELLS_FIELD_NUMBER: _ClassVar[int]
    repository: str
    push: str
    first: int
    cells: _containers.RepeatedCompositeFieldContainer[PlannedCell]
    def __init__(self, repository: _Optional[str] = ..., push: _Optional[str] = ..., first: _Optional[int] = ..., cells: _Optional[_Iterable[_Union[PlannedCell, _Mapping]]] = ...) -> None: ...

class PlannedCell(_message.Message):
    __slots__ = ("tensor", "number", "chunk", "companion")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMPANION_FIELD_NUMBER: _ClassVar[int]
    tensor: str
    number: int
    chunk: bytes
    companion: Companion
    def __init__(self, tensor: _Optional[str] = ..., number: _Optional[int] = ..., chunk: _Optional[bytes] = ..., companion: _Optional[_Union[Companion, _Mapping]] = ...) -> None: ...

class Companion(_message.Message):
    __slots__ = ("tensor", "number")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    tensor: str
    number: int
    def __init__(self, tensor: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class PlanReply(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[Answer]
    def __init__(self, answers: _Optional[_Iterable[_Union[Answer, _Mapping]]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("missing", "base", "companion")
    MISSING_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    COMPANION_FIELD_NUMBER: _ClassVar[int]
    missing: bool
    base: bytes
    companion: bytes
    def __init__(self, missing: bool = ..., base: _Optional[bytes] = ..., companion: _Optional[bytes] = ...) -> None: ...

class WriteHeader(_message.Message):
    __slots__ = ("repository", "push")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    repository: str
    push: str
    def __init__(self, repository: _Optional[str] = ..., push: _Optional[str] = ...) -> None: ...

class GrantRequest(_message.Message):
    __slots__ = ("repository", "push", "number", "blobs", "arrived")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_FIELD_NUMBER: _ClassVar[int]
    repository: str
    push: str
    number: int
    blobs: bytes
    arrived: int
    def __init__(self, repository: _Optional[str] = ..., push: _Optional[str] = ..., number: _Optional[int] = ..., blobs: _Optional[bytes] = ..., arrived: _Optional[int] = ...) -> None: ...

class GrantReply(_message.Message):
    __slots__ = ("url", "tail")
    URL_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    url: str
    tail: bytes
    def __init__(self, url: _Optional[str] = ..., tail: _Optional[bytes] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("repository", "push", "description")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    repository: str
    push: str
    description: bytes
    def __init__(self, repository: _Optional[str] = ..., push: _Optional[str] = ..., description: _Optional[bytes] = ...) -> None: ...

class PartReply(_message.Message):
    __slots__ = ("part",)
    PART_FIELD_NUMBER: _ClassVar[int]
    part: bytes
    def __init__(self, part: _Optional[bytes] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("repository", "push", "part")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    repository: str
    push: str
    part: bytes
    def __init__(self, repository: _Optional[str] = ..., push: _Optional[str] = ..., part: _Optional[bytes] = ...) -> None: ...

class OutcomeReply(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: Version
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class PairRequest(_message.Message):
    __slots__ = ("repository", "a", "b", "include", "exclude", "equal")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    A_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    EQUAL_FIELD_NUMBER: _ClassVar[int]
    repository: str
    a: str
    b: str
    include: _containers.RepeatedScalarFieldContainer[str]
    exclude: _containers.RepeatedScalarFieldContainer[str]
    equal: bool
    def __init__(self, repository: _Optional[str] = ..., a: _Optional[str] = ..., b: _Optional[str] = ..., include: _Optional[_Iterable[str]] = ..., exclude: _Optional[_Iterable[str]] = ..., equal: bool = ...) -> None: ...

class DiffReply(_message.Message):
    __slots__ = ("added", "removed", "reshaped", "changed", "same")
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    RESHAPED_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    SAME_FIELD_NUMBER: _ClassVar[int]
    added: _containers.RepeatedScalarFieldContainer[str]
    removed: _containers.RepeatedScalarFieldContainer[str]
    reshaped: _containers.RepeatedScalarFieldContainer[str]
    changed: _containers.RepeatedScalarFieldContainer[str]
    same: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, added: _Optional[_Iterable[str]] = ..., removed: _Optional[_Iterable[str]] = ..., reshaped: _Optional[_Iterable[str]] = ..., changed: _Optional[_Iterable[str]] = ..., same: _Optional[_Iterable[str]] = ...) -> None: ...

class DistanceUpdate(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorMoments]
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorMoments, _Mapping]]] = ...) -> None: ...

class TensorMoments(_message.Message):
    __slots__ = ("name", "elements", "count", "changed", "squared_difference", "absolute_difference", "largest_difference", "dot", "squared_a", "squared_b")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    SQUARED_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    ABSOLUTE_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    LARGEST_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    DOT_FIELD_NUMBER: _ClassVar[int]
    SQUARED_A_FIELD_NUMBER: _ClassVar[int]
    SQUARED_B_FIELD_NUMBER: _ClassVar[int]
    name: str
    elements: int
    count: int
    changed: int
    squared_difference: float
    absolute_difference: float
    largest_difference: float
    dot: float
    squared_a: float
    squared_b: float
    def __init__(self, name: _Optional[str] = ..., elements: _Optional[int] = ..., count: _Optional[int] = ..., changed: _Optional[int] = ..., squared_difference: _Optional[float] = ..., absolute_difference: _Optional[float] = ..., largest_difference: _Optional[float] = ..., dot: _Optional[float] = ..., squared_a: _Optional[float] = ..., squared_b: _Optional[float] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("repository", "deep", "doubtful")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    DEEP_FIELD_NUMBER: _ClassVar[int]
    DOUBTFUL_FIELD_NUMBER: _ClassVar[int]
    repository: str
    deep: bool
    doubtful: bool
    def __init__(self, repository: _Optional[str] = ..., deep: bool = ..., doubtful: bool = ...) -> None: ...

class AuditRequest(_message.Message):
    __slots__ = ("repository", "after")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    repository: str
    after: str
    def __init__(self, repository: _Optional[str] = ..., after: _Optional[str] = ...) -> None: ...

class AuditReply(_message.Message):
    __slots__ = ("name", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class VerifyUpdate(_message.Message):
    __slots__ = ("entries", "versions", "packs", "blobs", "read_nbytes", "problems", "done", "vouched")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    PACKS_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    READ_NBYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    VOUCHED_FIELD_NUMBER: _ClassVar[int]
    entries: int
    versions: int
    packs: int
    blobs: int
    read_nbytes: int
    problems: _containers.RepeatedCompositeFieldContainer[Problem]
    done: bool
    vouched: int
    def __init__(self, entries: _Optional[int] = ..., versions: _Optional[int] = ..., packs: _Optional[int] = ..., blobs: _Optional[int] = ..., read_nbytes: _Optional[int] = ..., problems: _Optional[_Iterable[_Union[Problem, _Mapping]]] = ..., done: bool = ..., vouched: _Optional[int] = ...) -> None: ...

class Problem(_message.Message):
    __slots__ = ("kind", "message", "where")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    where: str
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ..., where: _Optional[str] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("id", "principal", "role", "repositories", "refs", "expires", "revoked")
    ID_FIELD_NUMBER: _ClassVar[int]
    PRINCIPAL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    REPOSITORIES_FIELD_NUMBER: _ClassVar[int]
    REFS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    id: str
    principal: str
    role: str
    repositories: _containers.RepeatedScalarFieldContainer[str]
    refs: _containers.RepeatedScalarFieldContainer[str]
    expires: int
    revoked: bool
    def __init__(self, id: _Optional[str] = ..., principal: _Optional[str] = ..., role: _Optional[str] = ..., repositories: _Optional[_Iterable[str]] = ..., refs: _Optional[_Iterable[str]] = ..., expires: _Optional[int] = ..., revoked: bool = ...) -> None: ...

class CreateTokenRequest(_message.Message):
    __slots__ = ("principal", "role", "repositories", "refs", "ttl_s")
    PRINCIPAL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    REPOSITORIES_FIELD_NUMBER: _ClassVar[int]
    REFS_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    principal: str
    role: str
    repositories: _containers.RepeatedScalarFieldContainer[str]
    refs: _containers.RepeatedScalarFieldContainer[str]
    ttl_s: int
    def __init__(self, principal: _Optional[str] = ..., role: _Optional[str] = ..., repositories: _Optional[_Iterable[str]] = ..., refs: _Optional[_Iterable[str]] = ..., ttl_s: _Optional[int] = ...) -> None: ...

class CreateTokenReply(_message.Message):
    __slots__ = ("secret", "token")
    SECRET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    secret: str
    token: Token
    def __init__(self, secret: _Optional[str] = ..., token: _Optional[_Union[Token, _Mapping]] = ...) -> None: ...

class ListTokensReply(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ...) -> None: ...

class RevokeTokenRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...
