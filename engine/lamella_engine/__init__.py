"""Content-addressed, delta-compressed history for named tensors.

Read upwards; a module imports only from the lines below its own.

    repository                      push, checkout, log, diff, distance, refs
    distance  maintenance           compare; verify
    versions  pushing               what users hold; from a checkpoint to a version
    reading                         from versions to memory
    content_store                   the seam: dedup, packs, bases, the log
    checkpoints                     tensors in files and in memory, and back
    chunk_index                     id -> packs, derived
    objects  executor               where bytes rest, where work runs
    codecs  torch_tensors           pure functions; the one module that knows torch
    format                          bytes <-> model
    model                           the nouns
    chunking  dtypes                the grid; element types
    errors                          what can go wrong

Only ``lamella`` is public; everything here may change with it.
"""
