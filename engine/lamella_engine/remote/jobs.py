"""What a service does to a whole repository, where its bytes lie."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing

from lamella_engine.auditing import STORED_NBYTES, Act, NotedRead, Stored, audit
from lamella_engine.distance import Distance, assembled
from lamella_engine.errors import CorruptionError, InvalidInputError, LamellaError
from lamella_engine.heads import Head
from lamella_engine.jobs import Diff, Stats
from lamella_engine.maintenance import Problem, Verification
from lamella_engine.model import VersionId
from lamella_engine.moments import Moments
from lamella_engine.reading import Selection
from lamella_engine.remote.channel import Channel, Patience, patiently
from lamella_engine.rpc import lamella_pb2 as pb
from lamella_engine.wire import decode_objects


class RemoteJobs:
    """See :class:`~lamella_engine.jobs.Jobs`.

    Parameters
    ----------
    channel, repository
        Where.
    seen
        Entries of its log that this user has seen.
    """

    def __init__(self, channel: Channel, repository: str, *, seen: Collection[Head]) -> None:
        self._channel = channel
        self._repository = repository
        self._seen = tuple(seen)

    def stats(self) -> Stats:
        """See :class:`~lamella_engine.jobs.Jobs`."""
        reply = self._channel.call("Repositories.Stats", pb.RepositoryRequest(repository=self._repository))
        return Stats(
            models=reply.models,
            versions=reply.versions,
            packs=reply.packs,
            decoded_nbytes=reply.decoded_nbytes,
            stored_nbytes=reply.stored_nbytes,
        )

    def diff(self, a: VersionId, b: VersionId) -> Diff:
        """See :class:`~lamella_engine.jobs.Jobs`."""
        request = pb.PairRequest(repository=self._repository, a=a, b=b)
        return patiently(lambda: _diff(self._channel.stream("Jobs.Diff", request)))

    def distance(self, a: VersionId, b: VersionId, selection: Selection) -> Distance:
        """See :class:`~lamella_engine.jobs.Jobs`."""
        different = self._moments(a, b, selection, equal=False)
        all_names = {name for name, _, _ in different}

        def complete(names: Collection[str]) -> Moments:
            wanted = selection if set(names) == all_names else Selection(tuple(names), ())
            equal = self._moments(a, b, wanted, equal=True)
            ours = (found for name, _, found in different if name in names)
            return sum((found for name, _, found in equal if name in names), sum(ours, Moments()))

        return assembled(different, complete)

    def _moments(
        self, a: VersionId, b: VersionId, selection: Selection, *, equal: bool
    ) -> list[tuple[str, int, Moments]]:
        """Return name, elements and moments of each selected tensor, over the chunks that are equal or differ."""
        request = pb.PairRequest(
            repository=self._repository,
            a=a,
            b=b,
            include=selection.include or (),
            exclude=selection.exclude,
            equal=equal,
        )
        return patiently(
            lambda: [
                (found.name, found.elements, _moments(found))
                for update in self._channel.stream("Jobs.Distance", request)
                for found in update.tensors
            ]
        )

    def verify(self, *, deep: bool, doubtful: bool) -> Verification:
        """See :class:`~lamella_engine.jobs.Jobs`."""
        request = pb.VerifyRequest(repository=self._repository, deep=deep, doubtful=doubtful)
        return patiently(lambda: _verification(self._channel.stream("Jobs.Verify", request), deep=deep or doubtful))

    def audit(self) -> Iterator[Act | NotedRead | Problem]:
        """See :class:`~lamella_engine.jobs.Jobs`."""
        return audit(self._stored, self._seen)

    def signers(self) -> tuple[bytes, ...]:
        """See :class:`~lamella_engine.jobs.Jobs`; raises InvalidInputError (``remote_signers``)."""
        raise _remote_signers()

    def require_signed(self, keys: Sequence[bytes]) -> tuple[bytes, ...]:
        """See :class:`~lamella_engine.jobs.Jobs`; raises InvalidInputError (``remote_signers``)."""
        raise _remote_signers()

    def _stored(self, directory: str) -> Iterator[Stored]:
        """Yield the objects of a directory; what breaks off goes on after the last that came."""
        after = directory
        patience = Patience()
        while True:
            request = pb.AuditRequest(repository=self._repository, after=after)
            try:
                with closing(self._channel.stream("Jobs.Audit", request)) as messages:
                    for name, data in decode_objects(messages, most_nbytes=STORED_NBYTES):
                        if not name.startswith(directory) or name <= after:
                            raise CorruptionError("the service sent what was not asked for", kind="bad_reply")
                        after = name
                        patience.renew()
                        yield name, data
            except LamellaError as error:
                patience.wait(error)
            else:
                return


def _diff(replies: Iterable[pb.DiffReply]) -> Diff:
    names: dict[str, list[str]] = {field: [] for field in Diff.__dataclass_fields__}
    for reply in replies:
        for field, some in names.items():
            some += getattr(reply, field)
    return Diff(**{field: tuple(some) for field, some in names.items()})


def _moments(found: pb.TensorMoments) -> Moments:
    return Moments(**{name: getattr(found, name) for name in Moments.__dataclass_fields__})


def _verification(updates: Iterator[pb.VerifyUpdate], *, deep: bool) -> Verification:
    report = Verification(deep)
    done = False
    for update in updates:
        for name in ("entries", "versions", "packs", "blobs", "read_nbytes", "vouched"):
            setattr(report, name, getattr(update, name))
        report.problems += (Problem(found.kind, found.message, found.where) for found in update.problems)
        done = update.done
    if not done:
        raise CorruptionError("the service stopped before all was verified", kind="short_stream")
    return report


def _remote_signers() -> InvalidInputError:
    return InvalidInputError(
        "what a service records it signs itself: see serve --require-signed; audit says who signed what",
        kind="remote_signers",
    )
