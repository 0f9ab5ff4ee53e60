"""Ray: a checkpoint that lies in pieces on the nodes of a cluster becomes one ordinary version.

    shards = ray.get([trainer.shard.remote() for trainer in trainers])    # each returns Shard.of_tensors(its state)
    lamella.ray.push(shards, "llm@main", "s3://bucket/weights", message="step 2000")

What is pushed is hashed, encoded and stored on the node where it lies, by one encoder (an actor) for each node; only
the pieces of cells that lie on several nodes travel between them. Whoever calls ``push`` coordinates, and records the
version at the end: until then nothing is visible. An encoder that dies is started again, and does again what it was at;
what it and others had handed over is not sent twice.

What is asked of a whole repository is spread over the nodes too: ``repo.distance(a, b, executor="ray")``,
``repo.verify(deep=True, executor="ray")``, and :func:`import_checkpoints`.

This package imports ray; ``import lamella`` does not.
"""

from lamella.ray.groups import Group
from lamella.ray.imports import Imported, import_checkpoints
from lamella.ray.pushes import push
from lamella.ray.shards import Place, Shard
from lamella.ray.uploads import LamellaUpload

__all__ = ["Group", "Imported", "LamellaUpload", "Place", "Shard", "import_checkpoints", "push"]
