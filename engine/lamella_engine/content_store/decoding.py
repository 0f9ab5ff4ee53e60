"""From blobs to bytes: the one way in which a chain of deltas becomes a chunk."""

import threading
from collections.abc import Sequence

import numpy as np

from lamella_engine import codecs
from lamella_engine.content_store.seam import Blob
from lamella_engine.errors import CorruptionError
from lamella_engine.format.digests import chunk_id
from lamella_engine.model import Buffer, ChunkId


class _Scratch(threading.local):
    """Two buffers for each thread, for the bases of a chain.

    They are used again and again, because first touch of fresh memory is slow.
    """

    def __init__(self) -> None:
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def buffer(self, which: int, nbytes: int) -> memoryview:
        if self._buffers[which].size < nbytes:
            self._buffers[which] = np.empty(nbytes, np.uint8)
        return self._buffers[which].data[:nbytes]


_scratch = _Scratch()


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
        Whether to compute the chunk's id again and compare it: costs 50-80 % of a decode.

    Raises
    ------
    CorruptionError
        A payload breaks a rule of its encoding, the chain does not fit together, or (with ``check``) the id differs.
    """
    for at, blob in enumerate(chain):
        if (blob.base is None) != (base is None) or (at > 0 and blob.base != chain[at - 1].chunk):
            raise CorruptionError("a chain of deltas does not fit together", kind="bad_chain")
        last = at == len(chain) - 1
        target = out if last else _scratch.buffer(at % 2, blob.decoded_nbytes)
        if len(target) != blob.decoded_nbytes:
            raise CorruptionError(
                f"a chunk of {blob.decoded_nbytes} bytes stands where {len(target)} belong", kind="bad_length"
            )
        codecs.decode(blob.encoding, blob.payload, target, width=blob.width, base=base)
        base = target
    if check:
        check_chunk(chain[-1].chunk, out)


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
