"""Ray Data runs the workers: a pool of actors, as many as are asked for, on this machine or on a cluster.

The rows of the data set are numbers of partitions. Ray Data gives a free actor the next one, holds few in flight, and
starts a dead actor and its partition again; the workers read and write. So no image and no result passes through the
driver, and since a partition is a file, what Ray does twice is there once.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from unflaw._version import __version__
from unflaw.scale.plan import Plan
from unflaw.scale.store import Store
from unflaw.scale.worker import Done, Worker

IN_FLIGHT = 2  # partitions at an actor: one that it does and one that waits, so that it never does
BLOCKS = 10_000  # tasks of a run at most: with more partitions than that, a task is several


class Inspect:
    """The actor: see `Worker`."""

    def __init__(self, store: Store, plan: Plan, files: Any, version: str, options: dict[str, Any]) -> None:
        if version != __version__:
            raise RuntimeError(f"the workers have unflaw {__version__} and the driver {version}; install the same")
        import ray

        self.worker = Worker(store, plan, ray.get(files), **options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (partition,) = batch["partition"].tolist()
        done = self.worker.do(partition)
        return {
            "partition": [partition],
            "error": [done.error or ""],
            **{name: [done.counts[name]] for name in ("good", "review", "defect", "failed")},
        }


@contextmanager
def running(address: str | None, processors: int) -> Iterator[Any]:
    """Ray, which is started here, or joined by its address; that which runs in this process already is left as it is.

    Args:
        address: "auto", "host:port" or "ray://host:port"; None: $RAY_ADDRESS, or else Ray on this machine alone.
        processors: To start with on this machine.

    Raises:
        ValueError: It is not to be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else it warns on the terminal of what is meant so
    import ray
    import ray.data

    ours = not ray.is_initialized()
    if ours:
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        local: dict[str, Any] = {"num_cpus": processors, "include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ValueError(f"--address {address}: Ray is not to be reached there ({error})") from error
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars = context.print_on_execution_start = False
    logger, level = logging.getLogger("ray.data"), logging.getLogger("ray.data").level
    logger.setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before
        logger.setLevel(level)
        if ours:
            ray.shutdown()


def run(
    ray: Any,
    store: Store,
    plan: Plan,
    files: dict[str, bytes],
    partitions: Sequence[int],
    workers: int | None,
    options: dict[str, Any],
) -> Iterator[Done]:
    """Does partitions, in any order; what comes of each is told as it ends.

    Args:
        workers: None: as many as the processors of the cluster allow. More than that wait for a cluster that grows.
        options: Of `Worker`: "threads" and "retry".

    Raises:
        ValueError: A worker with more threads than there are processors, or Ray ends the run.
    """
    threads = options["threads"]
    most = int(ray.cluster_resources().get("CPU", 1)) // threads
    if most < 1:
        raise ValueError(f"--threads {threads}: Ray has fewer processors; ask for less")
    actors = min(workers or most, len(partitions))
    data = ray.data.from_items(
        [{"partition": number} for number in partitions], override_num_blocks=min(len(partitions), BLOCKS)
    )
    done = data.map_batches(
        Inspect,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=IN_FLIGHT),
        num_cpus=threads,
        fn_constructor_args=(store, plan, ray.put(files), __version__, options),
    )  # Ray Data restarts actors and retries their tasks without end; `Worker` sees to it that there is one
    try:
        for row in done.iter_rows():
            counts = Counter({name: row[name] for name in ("good", "review", "defect", "failed") if row[name]})
            yield Done(row["partition"], counts, row["error"] or None)
    except ray.exceptions.RayError as error:  # a worker that cannot begin, or a cluster that is gone
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"Ray has ended the run ({reason}); the same command goes on with it") from error
