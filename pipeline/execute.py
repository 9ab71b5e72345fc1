"""Where tasks run: in this process, on a local Dask cluster, or on any running Dask scheduler.

A task is a module-level function with small picklable arguments and a small result: paths and receipts travel,
arrays do not. Tasks may be added while results come back. Order of completion is not defined and nothing may
depend on it.
"""

from __future__ import annotations

import errno
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from ..schemas.errors import DataError, DpipeError, Interrupted, UsageError
from .durable import FULL

DRAIN_S = 50.0  # a stop request waits this long for tasks under way; the promise to the outside is 60 s
IN_FLIGHT_PER_WORKER = 4  # enough to hide the scheduler's latency, few enough to stop soon
CLUSTER = "cluster:"  # in the place of an address: settings of jobs to start, see cluster.py
SCHEDULER_LOST_S = 5.0  # a connection that is down for longer is not coming back
RESULT_S = 5.0  # receipts are small: what takes longer to arrive is no longer where it was
FAILURES_ALLOWED = 2  # a task that takes a third worker down with it is given up


READ_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV)  # the disk's, not the file's
Task = tuple[Any, Callable[..., Any], tuple[Any, ...]]  # key, function, arguments


@dataclass(frozen=True)
class Failure:
    """A task that raised, or that killed every worker it ran on."""

    message: str
    killed_workers: bool = False
    error: BaseException | None = None


@dataclass
class StopRequest:
    """Set by a signal or by --max-time; read between tasks."""

    reason: str = ""
    event: threading.Event = field(default_factory=threading.Event)
    answered: bool = False

    def set(self, reason: str) -> None:
        if not self.event.is_set():
            self.reason = reason
            self.event.set()

    def check(self) -> None:
        """Between two steps: end here where somebody asked for it."""
        if self.event.is_set():
            self.answered = True
            raise Interrupted(f"stopped by {self.reason}; run the same command again to go on")


_unanswered: list[str] = []  # signals that came when nothing was left to stop: what follows hears them


@contextmanager
def stop_requests(max_time_s: float | None) -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM, SIGUSR1 and the time limit into one request that is honoured between tasks."""
    request = StopRequest()
    while _unanswered:
        request.set(_unanswered.pop())
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    names = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    before = {
        name: signal.signal(name, lambda number, _: request.set(signal.Signals(number).name))
        for name in names
    }
    timer = (
        threading.Timer(max_time_s, request.set, (f"--max-time of {max_time_s:g} s",)) if max_time_s else None
    )
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield request
        if request.reason in {name.name for name in names} and not request.answered:
            _unanswered.append(request.reason)
    finally:
        if timer:
            timer.cancel()
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def _unheard(*signals: signal.Signals) -> Iterator[None]:
    """Threads and processes that begin within never hear these signals; this thread does again afterwards.

    Ctrl-C on a terminal and some batch systems signal every process of a job: workers are to finish what they do.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    resource_tracker.ensure_running()  # else a thread's first process starts it, which lets SIGINT through again
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Executor:
    """Runs tasks here, one after the other: `--workers 0`, and the base of the Dask one.

    with executor: executor.submit(key, function, *args); for key, result in executor.results(): ...
    A result that is a `Failure` says so; nothing raises across tasks except a stop request (Interrupted).
    `results(tasks)` draws further tasks from an iterator as places become free: a million need not be held.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self.waiting: deque[Task] = deque()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def description(self) -> str:
        return "this process"

    def submit(self, key: Any, function: Callable[..., Any], *args: Any) -> None:
        self.waiting.append((key, function, args))

    def results(self, tasks: Iterable[Task] = ()) -> Iterator[tuple[Any, Any]]:
        more = iter(tasks)
        while True:
            self.stop.check()
            task = self._next(more)
            if task is None:
                return
            key, function, args = task
            yield key, attempt(function, args)

    def _next(self, more: Iterator[Task]) -> Task | None:
        """What was submitted goes before what is drawn."""
        return self.waiting.popleft() if self.waiting else next(more, None)


class DaskExecutor(Executor):
    """A running scheduler by address, or a LocalCluster of single-threaded processes."""

    def __init__(self, stop: StopRequest, workers: int, scheduler: str | None) -> None:
        super().__init__(stop)
        self.workers, self.scheduler = workers, scheduler
        self.cluster: Any = None
        self.client: Any = None
        self.scratch: TemporaryDirectory[str] | None = None  # Dask's own would stay where temporary files lie

    def __enter__(self) -> DaskExecutor:
        import dask.config
        from distributed import Client, LocalCluster

        dask.config.set(
            {
                "distributed.scheduler.allowed-failures": FAILURES_ALLOWED,
                "distributed.worker.daemon": True,
                "distributed.worker.profile.enabled": False,  # samples every thread every 10 ms
                # Every process looks 50 times a second whether its event loop is late, and twice at its own use of
                # processor and memory: of two busy cores, a fortieth.
                "distributed.admin.tick.interval": "1s",
                "distributed.admin.system-monitor.interval": "5s",
                "distributed.comm.retry.count": 3,
            }
        )
        if self.scheduler and self.scheduler.startswith(CLUSTER):
            from .cluster import open_cluster

            self.cluster, self.workers = open_cluster(self.scheduler)
            self.client = Client(self.cluster, set_as_default=False)
        elif self.scheduler:
            try:
                self.client = Client(self.scheduler, timeout="15s", set_as_default=False)
            except (OSError, TimeoutError) as error:
                raise UsageError(f"no Dask scheduler answers at {self.scheduler}: {error}") from error
            self.workers = max(1, len(self.client.scheduler_info(n_workers=-1)["workers"]))
        else:
            self.scratch = TemporaryDirectory(prefix="dpipe-workers-", ignore_cleanup_errors=True)
            dask.config.set({"temporary-directory": self.scratch.name})
            with _unheard(signal.SIGINT, signal.SIGUSR1):
                self.cluster = LocalCluster(
                    n_workers=self.workers,
                    threads_per_worker=1,
                    processes=True,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    memory_limit=0,  # our tasks bound their own memory; Dask's limit restarts workers instead
                    silence_logs=50,
                )
            self.client = Client(self.cluster, set_as_default=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self.client is not None:
            self.client.close(timeout=5)
        if self.cluster is not None:
            self.cluster.close()
        if self.scratch is not None:
            self.scratch.cleanup()

    def _scheduler_gone(self) -> DataError:
        return DataError(
            f"the Dask scheduler {self.scheduler or 'of this run'} went away\n"
            "  What is finished is kept: start it again, then run the same command again."
        )

    @property
    def description(self) -> str:
        where = "local cluster" if self.scheduler is None else self.scheduler.partition(":{")[0]
        return f"{self.workers} workers ({where}), dashboard {self.client.dashboard_link}"

    def results(self, tasks: Iterable[Task] = ()) -> Iterator[tuple[Any, Any]]:
        from distributed import CancelledError
        from distributed.scheduler import KilledWorker

        more = iter(tasks)
        running: dict[Any, Task] = {}
        suspects: deque[Task] = deque()
        alone = False  # whether the one task that runs is a suspect
        completed: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stopped_at: float | None = None
        lost_at: float | None = None
        while True:
            if self.stop.event.is_set():
                if stopped_at is None:
                    stopped_at = time.monotonic()
                    self.waiting.clear()
                    suspects.clear()
                    more = iter(())
                if not running or time.monotonic() - stopped_at > DRAIN_S:
                    self.stop.check()
            while not alone and len(running) < self.workers * IN_FLIGHT_PER_WORKER:
                task = self._next(more)
                if task is None and suspects and not running:
                    task, alone = suspects.popleft(), True
                if task is None:
                    break
                future = self.client.submit(attempt, *task[1:], pure=False)
                running[future] = task
                future.add_done_callback(completed.put)
            if not running:
                break
            try:
                future = completed.get(timeout=0.2)  # a stop request must be seen while tasks run
            except queue.Empty:
                if self.scheduler is None and len(self.cluster.workers) < self.workers:
                    self.cluster.scale(self.workers)  # a nanny whose worker died while starting gives up
                lost_at = None if self.client.status == "running" else lost_at or time.monotonic()
                if lost_at is not None and time.monotonic() - lost_at > SCHEDULER_LOST_S:
                    raise self._scheduler_gone() from None
                continue
            task = running.pop(future)
            tried_alone, alone = alone, False
            try:
                result = future.result(timeout=RESULT_S)
            except TimeoutError:  # it was lost with its worker and is computed again
                running[future], alone = task, tried_alone
                future.add_done_callback(completed.put)
                continue
            except CancelledError as error:
                raise self._scheduler_gone() from error
            except KilledWorker:
                if not tried_alone:  # Dask blames whatever waited on the worker: only alone is it guilty
                    suspects.append(task)
                    continue
                result = Failure(f"took {FAILURES_ALLOWED + 1} workers down, one after the other", True)
            except Exception as error:  # noqa: BLE001 - the scheduler's own failures are the task's outcome
                result = Failure(f"{type(error).__name__}: {error}", error=error)
            yield task[0], result
        self.stop.check()


def attempt(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The result, or a Failure in place of whatever was raised."""
    try:
        return function(*args)
    except DpipeError as error:
        return Failure(str(error))
    except OSError as error:
        if told := disk_trouble(error):
            return Failure(told, error=error)
        return Failure(f"{type(error).__name__}: {error}", error=error)
    except Exception as error:  # noqa: BLE001 - one task's bug must not end the others
        import traceback

        return Failure(f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}", error=error)


def disk_trouble(error: OSError) -> str:
    """What is wrong with a disk, in words; "" for errors of other kinds."""
    where = f": {error.filename}" if error.filename else ""
    if error.errno in FULL:
        return f"the disk is full{where}"
    if error.errno in READ_ERRORS:
        return f"the disk cannot be read ({os.strerror(error.errno or 0)}){where}"
    return ""


def open_executor(stop: StopRequest, workers: int, scheduler: str | None) -> Executor:
    """Workers 0: this process. A scheduler address wins over a count."""
    if scheduler is None and workers == 0:
        return Executor(stop)
    return DaskExecutor(stop, workers, scheduler)
