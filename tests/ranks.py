"""Ranks for tests: processes of one gloo group, each of which runs a function and gives back what it returns.

They are forked from a process that has imported what the first of them needed, and done nothing else: to import torch
takes each rank that is spawned seconds.
"""

import multiprocessing
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def run_ranks(function: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """Run ``function(rank, world, *arguments)`` in ``world`` processes; return what each returned or raised."""
    multiprocessing.set_forkserver_preload([function.__module__, "torch.distributed.fsdp"])
    port = free_port()
    started: Any = mp.start_processes  # type: ignore[attr-defined]
    context = started(
        _run, (function, world, port, folder, arguments), nprocs=world, join=False, start_method="forkserver"
    )
    while not context.join():
        pass
    return [pickle.loads((folder / f"rank{rank}-{port}").read_bytes()) for rank in range(world)]


def _run(rank: int, function: Callable[..., Any], world: int, port: int, folder: Path, arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        found: Any = function(rank, world, *arguments)
    except BaseException as error:
        traceback.print_exc()
        found = error
    (folder / f"rank{rank}-{port}").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
