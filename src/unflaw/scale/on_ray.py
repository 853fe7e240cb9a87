"""Ray Data as the engine: a pool of actors on this machine or on a cluster.

The rows of the data set are partition numbers. Ray Data gives the next one to a free actor, keeps few in flight, and
restarts a dead actor together with its partition. Workers read images and write results themselves, so neither passes
through the driver, and a partition that Ray runs twice still has one file.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from unflaw._version import __version__
from unflaw.scale.plan import Plan
from unflaw.scale.store import Store
from unflaw.scale.worker import PartitionResult, Worker

IN_FLIGHT = 2  # partitions at an actor: one in work and one waiting
BLOCKS = 10_000  # maximum number of tasks; with more partitions, a task has several


class WorkerActor:
    """Actor that runs a `Worker`."""

    def __init__(self, store: Store, plan: Plan, files: Any, version: str, options: dict[str, Any]) -> None:
        if version != __version__:
            raise RuntimeError(f"the workers have unflaw {__version__} and the driver {version}; install the same")
        import ray

        self.worker = Worker(store, plan, ray.get(files), **options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (partition,) = batch["partition"].tolist()
        return {"result": [json.dumps(self.worker.process(partition))]}


@contextmanager
def running(address: str | None, processors: int) -> Iterator[Any]:
    """Start Ray or connect to a cluster, and yield the module `ray`. A Ray that runs in this process is used as it is.

    Args:
        address: "auto", "host:port" or "ray://host:port"; None: $RAY_ADDRESS, or else a new Ray on this machine.
        processors: Number of CPUs of a new Ray.

    Raises:
        ValueError: The cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # or it warns of intended settings on the terminal
    import ray
    import ray.data

    started = not ray.is_initialized()
    if started:
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        local: dict[str, Any] = {"num_cpus": processors, "include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ValueError(f"--address {address}: Ray is not to be reached there ({error})") from error
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars = context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before
        logger.setLevel(level)
        if started:
            ray.shutdown()


def run(
    ray: Any,
    store: Store,
    plan: Plan,
    files: dict[str, bytes],
    partitions: Sequence[int],
    *,
    workers: int | None,
    threads: int,
    retry: bool,
) -> Iterator[PartitionResult]:
    """Process partitions, given by their numbers, and yield the results in the order of completion.

    Args:
        store, plan, files, threads, retry: See `Worker`.
        workers: Number of actors; None: as many as the processors allow. A cluster may have to grow for more.

    Raises:
        ValueError: A worker has more threads than Ray has processors, or Ray ends the run.
    """
    most = int(ray.cluster_resources().get("CPU", 1)) // threads
    if most < 1:
        raise ValueError(f"--threads {threads}: Ray has fewer processors; ask for less")
    rows = [{"partition": number} for number in partitions]
    data = ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS))
    options = {"threads": threads, "retry": retry}
    actors = min(workers or most, len(rows))
    results = data.map_batches(
        WorkerActor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=IN_FLIGHT),
        num_cpus=threads,
        fn_constructor_args=(store, plan, ray.put(files), __version__, options),
    )  # Ray Data restarts actors and retries their tasks without end; `AttemptLog` provides an end
    try:
        for row in results.iter_rows():
            partition, counts, error = json.loads(row["result"])
            yield PartitionResult(partition, Counter(counts), error)
    except ray.exceptions.RayError as error:  # a worker cannot begin, or the cluster is gone
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"Ray has ended the run ({reason}); the same command goes on with it") from error
