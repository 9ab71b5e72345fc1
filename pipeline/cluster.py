"""`--scheduler cluster`: workers as jobs of a batch system, by dask-jobqueue and the [cluster] table of dpipe.toml.

    [cluster]
    type = "slurm"          # slurm, pbs, sge, lsf, oar, htcondor, moab
    jobs = 16               # how many to keep in the queue
    cores = 8               # of a job; one process a core
    memory = "32GB"
    queue = "long"          # and whatever else dask-jobqueue's class of that type takes, by its own name
    walltime = "04:00:00"

The settings travel as one text in the place of a scheduler's address, so that nothing between the command line and
the executor need know of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..schemas.errors import UsageError, unknown_name

WORD = "cluster"
TYPES = {
    "slurm": "SLURMCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "lsf": "LSFCluster",
    "oar": "OARCluster",
    "htcondor": "HTCondorCluster",
    "moab": "MoabCluster",
}


def scheduler_of(word: str | None, settings: Mapping[str, Any]) -> str | None:
    """The scheduler to use: an address as it is, the word `cluster` with what dpipe.toml says of one."""
    if word != WORD:
        return word
    told = settings.get(WORD)
    if not isinstance(told, Mapping):
        raise UsageError(
            "--scheduler cluster: dpipe.toml has no [cluster]\n"
            '  expected: type = "slurm", jobs = 16, cores = 8, memory = "32GB", ...\n'
            "  next: add it, or give the address of a running scheduler, tcp://host:port"
        )
    cluster_settings(told)
    return f"{WORD}:{json.dumps(told)}"


def cluster_settings(told: Mapping[str, Any]) -> tuple[str, int, dict[str, Any]]:
    """(dask-jobqueue's class, jobs, its arguments); UsageError for what is missing or wrong."""
    kind = str(told.get("type", ""))
    if kind not in TYPES:
        raise unknown_name("type of [cluster]", kind, TYPES)
    jobs, cores = told.get("jobs", 1), told.get("cores", 1)
    for name, value in (("jobs", jobs), ("cores", cores)):
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"[cluster] {name} = {value!r}: expected a whole number of 1 or more")
    if "memory" not in told:
        raise UsageError('[cluster] says no memory of a job\n  expected: memory = "32GB"')
    # One process a worker: HDF5 and video libraries do not share one, and a crash takes one episode with it.
    arguments = {name: value for name, value in told.items() if name not in ("type", "jobs")}
    return TYPES[kind], jobs, {"processes": cores, **arguments, "cores": cores}


def open_cluster(address: str) -> tuple[Any, int]:
    """(a started cluster, its workers) from `scheduler_of`'s text."""
    name, jobs, arguments = cluster_settings(json.loads(address.removeprefix(f"{WORD}:")))
    try:
        import dask_jobqueue
    except ImportError as error:
        raise UsageError(
            "[cluster] needs dask-jobqueue, which is not installed\n  next: pip install dask-jobqueue"
        ) from error
    try:
        cluster = getattr(dask_jobqueue, name)(**arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"[cluster] is not what dask-jobqueue's {name} takes: {error}") from error
    cluster.scale(jobs=jobs)
    return cluster, jobs * int(arguments["processes"])
