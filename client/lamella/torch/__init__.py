"""Modules, optimizers and nested states: into a repository, and back into memory that is there, from one rank or many.

    import lamella, lamella.torch

    lamella.torch.push(model, repo, "bert@main", message="step 2000")
    lamella.torch.load(model, repo, "bert@main~1", have="bert@main")    # reads only what changed

    dcp.save(state, storage_writer=lamella.torch.LamellaWriter(repo, "llm@run-7"))   # torch.distributed.checkpoint
    dcp.load(state, storage_reader=lamella.torch.LamellaReader(repo, "llm@run-7"))

This module imports torch; ``import lamella`` does not.
"""

from lamella.torch.distributed import LamellaReader, LamellaWriter
from lamella.torch.states import STATE_FILE, IncompatibleKeys, load, push, state

__all__ = ["STATE_FILE", "IncompatibleKeys", "LamellaReader", "LamellaWriter", "load", "push", "state"]
