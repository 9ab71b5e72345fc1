"""[cluster] of dpipe.toml: the batch system's jobs are what the table says, and what is wrong with it is said."""

import sys
from types import SimpleNamespace

import pytest
from dpipe.pipeline.cluster import cluster_settings, open_cluster, scheduler_of
from dpipe.pipeline.workspace import open_workspace
from dpipe.schemas.errors import UsageError

TABLE = """
[cluster]
type = "slurm"
jobs = 3
cores = 4
memory = "16GB"
queue = "long"
walltime = "02:00:00"
"""


def test_the_table_becomes_a_cluster_of_one_process_a_core(tmp_path, monkeypatch):
    (tmp_path / "dpipe.toml").write_text(TABLE)
    seen = {}

    class Fake:
        def __init__(self, **arguments):
            seen.update(arguments)

        def scale(self, jobs):
            seen["scaled to"] = jobs

    monkeypatch.setitem(sys.modules, "dask_jobqueue", SimpleNamespace(SLURMCluster=Fake))
    address = scheduler_of("cluster", open_workspace(tmp_path).settings)
    assert address is not None
    cluster, workers = open_cluster(address)
    assert isinstance(cluster, Fake) and workers == 12
    expected = {"cores": 4, "processes": 4, "memory": "16GB", "queue": "long", "walltime": "02:00:00"}
    assert seen == expected | {"scaled to": 3}


def test_dask_jobqueue_writes_that_job(tmp_path):
    dask_jobqueue = pytest.importorskip("dask_jobqueue")
    (tmp_path / "dpipe.toml").write_text(TABLE)
    name, jobs, arguments = cluster_settings(open_workspace(tmp_path).settings["cluster"])
    cluster = getattr(dask_jobqueue, name)(**arguments, scheduler_options={"dashboard": False})
    try:
        script = cluster.job_script()
    finally:
        cluster.close()
    assert jobs == 3 and "#SBATCH -p long" in script and "#SBATCH --cpus-per-task=4" in script
    assert "#SBATCH -t 02:00:00" in script and "--nworkers 4" in script and "--nthreads 1" in script


def test_what_the_table_lacks_is_said(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"no \[cluster\][\s\S]*tcp://host:port"):
        scheduler_of("cluster", {})
    with pytest.raises(UsageError, match="Did you mean 'slurm'"):
        scheduler_of("cluster", {"cluster": {"type": "slurn"}})
    with pytest.raises(UsageError, match="memory"):
        scheduler_of("cluster", {"cluster": {"type": "slurm"}})
    with pytest.raises(UsageError, match="jobs = 0"):
        scheduler_of("cluster", {"cluster": {"type": "slurm", "memory": "1GB", "jobs": 0}})
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    address = scheduler_of("cluster", {"cluster": {"type": "slurm", "memory": "1GB"}})
    assert address is not None
    with pytest.raises(UsageError, match="pip install dask-jobqueue"):
        open_cluster(address)


def test_an_address_stays_what_it_is():
    assert scheduler_of("tcp://host:8786", {}) == "tcp://host:8786" and scheduler_of(None, {}) is None
