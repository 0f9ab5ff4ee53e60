"""What it saves a service that clients put packs into its bucket by themselves.

    python -m benchmarks.direct s3://BUCKET/PREFIX [--rounds N]

The bucket is reached as the environment says (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...). Two float32 checkpoints of the
MiniLM family, the second a fine-tune of the first, are pushed from one process to a service in another: through it, and
straight into the bucket, in turn. What is shown are medians; the second push begins when the packs of the first are
verified.
"""

import argparse
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import lamella
from benchmarks import corpora
from lamella_engine.content_store.packed import PackedStore
from lamella_engine.executor import InlineExecutor
from lamella_engine.format.entry import VERIFIED_BY_STORE
from lamella_engine.objects import open_objects

ROUNDS = 5

WAYS = {"through the service": (), "straight into the bucket": ("--direct",)}


@contextmanager
def serving(root: str, *options: str) -> Iterator[tuple[int, str]]:
    """Run ``lamella serve`` on a free port of the loopback address; yield its process's id and its URL."""
    command = [sys.executable, "-c", "from lamella.cli import main; main()", "serve", "--root", root]
    command += ["--listen", "127.0.0.1:0", "--insecure-loopback", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.pid, f"grpc://{process.stdout.readline().split()[-1]}"
        finally:
            process.terminate()


def processor_s(process: int) -> float:
    """Return the seconds that a process has used of all processors."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def wait_until_verified(root: str) -> None:
    """Return when no pack is left that only its writer has decoded."""
    store = PackedStore(open_objects(root), InlineExecutor())
    while any(pack.verifier != VERIFIED_BY_STORE for pack in store.log.refresh().packs()):
        time.sleep(0.01)


def measure(url: str, *, rounds: int) -> dict[tuple[str, str], float]:
    """Return medians by way and figure."""
    family = corpora.minilm_family()
    first = next(checkpoint for checkpoint in family if checkpoint.parent is None)
    second = next(checkpoint for checkpoint in family if checkpoint.parent == first.name)
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for way, options in WAYS.items():
            root = f"{url.rstrip('/')}/{secrets.token_hex(8)}"
            with TemporaryDirectory() as cache, serving(root, *options) as (process, address):
                os.environ["XDG_CACHE_HOME"] = cache
                with lamella.init(f"{address}/team") as repo:
                    for name, checkpoint in (("first", first), ("fine-tune", second)):
                        data = checkpoint.path("float32")
                        data.read_bytes()  # into the page cache
                        used, mine, began = processor_s(process), time.process_time(), time.perf_counter()
                        repo.push(data, "minilm@main")
                        figures[way, f"{name}: seconds"].append(time.perf_counter() - began)
                        figures[way, f"{name}: client's processor"].append(time.process_time() - mine)
                        figures[way, f"{name}: service's, till recorded"].append(processor_s(process) - used)
                        wait_until_verified(f"{root}/team")
                        figures[way, f"{name}: service's, till verified"].append(processor_s(process) - used)
                        figures[way, f"{name}: seconds till verified"].append(time.perf_counter() - began)
    return {key: statistics.median(values) for key, values in figures.items()}


def main() -> None:
    """Run it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", metavar="s3://BUCKET/PREFIX")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    found = measure(options.url, rounds=options.rounds)
    table = Table("", *WAYS, "ratio", title="seconds", title_justify="left", box=SIMPLE_HEAD)
    for figure in dict.fromkeys(figure for _, figure in found):
        by_way = [found[way, figure] for way in WAYS]
        table.add_row(figure, *(f"{value:.3f}" for value in by_way), f"{by_way[1] / by_way[0]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
