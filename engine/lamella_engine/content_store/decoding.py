"""From blobs to bytes: the one way in which a chain of deltas becomes a chunk, or two become a measurement."""

import threading
from collections.abc import Sequence
from itertools import pairwise, takewhile

import numpy as np

from lamella_engine import codecs
from lamella_engine.content_store.seam import Blob
from lamella_engine.dtypes import Dtype
from lamella_engine.errors import CorruptionError
from lamella_engine.format.digests import chunk_id
from lamella_engine.model import Buffer, ChunkId
from lamella_engine.moments import Moments, moments


class _Scratch(threading.local):
    """A few buffers for each thread: two for the bases of a chain, three for what is measured, one that is lent.

    They are used again and again, because first touch of fresh memory is slow.
    """

    def __init__(self) -> None:
        self._buffers = [np.empty(0, np.uint8) for _ in range(6)]

    def buffer(self, which: int, nbytes: int) -> memoryview:
        if self._buffers[which].size < nbytes:
            self._buffers[which] = np.empty(nbytes, np.uint8)
        return self._buffers[which].data[:nbytes]


_scratch = _Scratch()

# Which buffers hold what two chains begin with alike, the chunk that each leads to, and what :func:`lend` returns.
_SHARED, _FIRST, _SECOND, _LENT = 2, 3, 4, 5


def decode_chain(chain: Sequence[Blob], out: memoryview, *, base: Buffer | None = None, check: bool = False) -> None:
    """Decode the last blob of a chain.

    Parameters
    ----------
    chain
        Each the base of the next; the first a full blob, or a delta against ``base``.
    out : writable, uint8
        Where the chunk goes; its content is undefined if this raises.
    base
        The decoded bytes of the chunk that the first blob's base names, if it is a delta; apart from ``out``. It is
        the caller's word that they are: a chunk that leans on it is to be checked.
    check
        Whether to compute the chunk's id again and compare it: costs 50-80 % of a decode. Done anyway if a blob is
        doubtful.

    Raises
    ------
    CorruptionError
        A payload breaks a rule of its encoding, the chain does not fit together, or the id was compared and differs.
    """
    _check_links(chain, held=base is not None)
    for at, blob in enumerate(chain):
        last = at == len(chain) - 1
        target = out if last else _scratch.buffer(at % 2, blob.decoded_nbytes)
        _check_length(blob.decoded_nbytes, len(target))
        codecs.decode(blob.encoding, blob.payload, target, width=blob.width, base=base)
        base = target
    if check or any(blob.doubtful for blob in chain):
        check_chunk(chain[-1].chunk, out)
    if chain[-1].keep is not None:
        chain[-1].keep(out)


def lend(chain: Sequence[Blob]) -> memoryview:
    """Return the last chunk of a chain, in memory that this thread's next call overwrites; raises CorruptionError."""
    out = _scratch.buffer(_LENT, chain[-1].decoded_nbytes)
    decode_chain(chain, out)
    return out


def measure_chains(first: Sequence[Blob], second: Sequence[Blob], dtype: Dtype, *, check: bool = False) -> Moments:
    """Measure the chunks that two chains lead to against each other.

    What both begin with is decoded once; if one chunk stands directly on the other, or on what both stand on, it is
    measured while it is decoded. Each way gives what :func:`~lamella_engine.moments.moments` gives, bit for bit.

    Parameters
    ----------
    first, second
        As for :func:`decode_chain`. ``second`` may also begin after the last blob of ``first``: with a delta against
        it, or, where the chunks are the same, be empty.
    dtype
        What the chunks are made of.
    check
        Whether to compute the ids of both chunks again, for which both are decoded whole.

    Raises
    ------
    CorruptionError
        As :func:`decode_chain`; or the chunks are of different lengths.
    """
    if not second or second[0].base is not None:
        second = (*first, *second)
    for chain in (first, second):
        _check_links(chain, held=False)
        check = check or any(blob.doubtful for blob in chain)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0].chunk == pair[1].chunk, zip(first, second, strict=False)))
    trunk, first, second = first[:shared], first[shared:], second[shared:]
    base = _decoded(trunk, None, _SHARED, check=check and not (first and second))
    if not second:
        return _measured(base, first, base, dtype, check=check).swapped
    return _measured(_decoded(first, base, _FIRST, check=check), second, base, dtype, check=check)


def _measured(
    chunk: memoryview | None, chain: Sequence[Blob], base: memoryview | None, dtype: Dtype, *, check: bool
) -> Moments:
    """Measure a chunk against the one that a chain leads to from ``base``."""
    assert chunk is not None
    if not chain or check or not codecs.is_measurable(chain[-1].encoding):
        decoded = _decoded(chain, base, _SECOND, check=check)
        assert decoded is not None
        _check_length(decoded.nbytes, chunk.nbytes)
        return moments(chunk, decoded, dtype)
    *stem, tip = chain
    _check_length(tip.decoded_nbytes, chunk.nbytes)
    return codecs.measure(tip.payload, chunk, dtype, width=tip.width, base=_decoded(stem, base, _SECOND, check=False))


def _decoded(chain: Sequence[Blob], base: memoryview | None, which: int, *, check: bool) -> memoryview | None:
    """Return the chunk that a chain leads to from ``base``, in a buffer; ``base`` itself if there is no chain."""
    if not chain:
        return base
    out = _scratch.buffer(which, chain[-1].decoded_nbytes)
    decode_chain(chain, out, base=base, check=check)
    return out


def _check_links(chain: Sequence[Blob], *, held: bool) -> None:
    """Raise CorruptionError unless each blob is the base of the next, and the first has one only if it is held."""
    fits = (chain[0].base is not None) == held and all(blob.base == base.chunk for base, blob in pairwise(chain))
    if not fits:
        raise CorruptionError("a chain of deltas does not fit together", kind="bad_chain")


def _check_length(nbytes: int, expected: int) -> None:
    if nbytes != expected:
        raise CorruptionError(f"a chunk of {nbytes} bytes stands where {expected} belong", kind="bad_length")


def check_blob(blob: Blob, base: Buffer | None, out: bytearray | None = None) -> None:
    """Raise CorruptionError unless a blob decodes to the chunk that it names.

    ``base`` is the decoded chunk ``blob.base``, None for a full blob. ``out`` gets the chunk, if it is given.
    """
    target: Buffer = _scratch.buffer(0, blob.decoded_nbytes) if out is None else out
    codecs.decode(blob.encoding, blob.payload, target, width=blob.width, base=base)
    check_chunk(blob.chunk, target)


def check_chunk(chunk: ChunkId, data: Buffer) -> None:
    """Raise CorruptionError unless ``data`` are the decoded bytes of ``chunk``."""
    if chunk_id(data) != chunk:
        raise CorruptionError(
            f"a blob does not decode to chunk {chunk.hex()[:12]}", kind="bad_chunk", chunk=chunk.hex()
        )
