"""Engines that spread the runs of `lit-lipschitz compare` over devices and machines: joblib, Ray, submitit."""

import contextlib
import importlib
import itertools
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from lit_lipschitz.cli.compare.trials import Trial, run_trial
from lit_lipschitz.cli.output import Busy, locked
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError
from lit_lipschitz.processes import check_processes

Engine: TypeAlias = Callable[[Iterable[Trial]], Generator[Trial, None, None]]
"""Makes runs and yields them as they end, in any order; those of other processes are copies."""


@dataclass(frozen=True)
class Spread:
    """How the runs are spread.

    Attributes:
        jobs: Largest number of runs at a time; None is as many as there is room for.
        gpus: Number of GPUs of this machine that the runs may use, one each; 0 for runs on the CPU.
        settings: Keyword arguments of the engine.
        folder: A folder that all machines see.
    """

    jobs: int | None
    gpus: int
    settings: dict[str, Any]
    folder: Path


def in_turn(trials: Iterable[Trial]) -> Generator[Trial, None, None]:
    """One run after another in this process."""
    yield from map(run_trial, trials)


def find_engine(name: str, spread: Spread) -> Engine:
    """An engine by its name.

    Raises:
        ConfigurationError: Its package is missing.
    """
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"compare --engine {name}: the package {name} can't be imported ({error}): pip install "
            f"'lit-lipschitz[{name}]', or pass another of {', '.join(ENGINES)}"
        ) from None

    def engine(trials: Iterable[Trial]) -> Generator[Trial, None, None]:
        todo = list(trials)
        with _ended_by_sigterm():
            yield from ENGINES[name](package, todo, spread) if todo else ()

    return engine


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Lets SIGTERM end the engine's processes too, as an exception does."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _joblib(package: ModuleType, trials: Sequence[Trial], spread: Spread) -> Generator[Trial, None, None]:
    """Processes of this machine; each run on a GPU of its own if there are several."""
    jobs = spread.jobs or spread.gpus or os.cpu_count() or 1
    settings = {"n_jobs": jobs, "return_as": "generator_unordered", **spread.settings}
    if isinstance(settings["n_jobs"], int):  # joblib starts them all, however few runs there are
        check_processes("compare --jobs", settings["n_jobs"])
    with tempfile.TemporaryDirectory(prefix="lit-lipschitz-") as folder:
        make = package.delayed(_run_on_free_gpu if spread.gpus > 1 else _run)
        tasks = (make(trial, Path(folder), jobs, spread.gpus) for trial in trials)
        parallel = package.Parallel(**settings)
        try:
            yield from parallel(tasks)
        except (RuntimeError, OSError) as error:  # a process that was killed ends them all
            raise LitLipschitzError(
                f"compare --engine joblib: {error}; the runs that ended are saved, and the same command continues"
            ) from error


def _run(trial: Trial, folder: Path, jobs: int, gpus: int) -> Trial:
    return run_trial(trial)


def _run_on_free_gpu(trial: Trial, folder: Path, jobs: int, gpus: int) -> Trial:
    """Makes a run on a GPU that no other run of this command uses, or that as few as possible use."""
    for slot in itertools.cycle(range(jobs)):
        with contextlib.suppress(Busy), locked(folder / str(slot), wait=False):
            return run_trial(replace(trial, arguments=[*trial.arguments, "--trainer.devices", f"[{slot % gpus}]"]))
    raise AssertionError


def _ray(package: Any, trials: Sequence[Trial], spread: Spread) -> Generator[Trial, None, None]:
    """Ray's tasks, on this machine or, with RAY_ADDRESS, on a cluster."""
    ours = not package.is_initialized()
    if ours:
        package.init(include_dashboard=False, log_to_driver=False)
    try:
        gpu = {"num_gpus": 1} if spread.gpus and package.cluster_resources().get("GPU") else {}
        task = package.remote(run_trial).options(**{"max_retries": 0, **gpu, **spread.settings})
        yield from _as_they_end(trials, spread.jobs, task.remote, lambda refs: package.wait(refs)[0][0], package.get)
    finally:
        if ours:
            package.shutdown()


def _submitit(package: Any, trials: Sequence[Trial], spread: Spread) -> Generator[Trial, None, None]:
    """Jobs of Slurm, or where there is none processes of this machine."""
    submitted: list[Any] = []

    def submit(trial: Trial) -> Any:
        submitted.append(executor.submit(run_trial, trial))
        return submitted[-1]

    with tempfile.TemporaryDirectory(prefix=".compare-jobs-", dir=spread.folder, ignore_cleanup_errors=True) as logs:
        executor = package.AutoExecutor(folder=logs)
        executor.update_parameters(**{"gpus_per_node": min(spread.gpus, 1), **spread.settings})
        jobs = spread.jobs
        if executor.cluster in ("local", "debug"):
            jobs = jobs or os.cpu_count() or 1
            check_processes("compare --jobs", jobs)
        try:
            first = lambda jobs: next(package.helpers.as_completed(jobs, poll_frequency=1))  # noqa: E731
            yield from _as_they_end(trials, jobs, submit, first, lambda job: job.result())
        finally:
            for job in submitted:
                if not job.done():
                    job.cancel()


def _as_they_end(
    trials: Sequence[Trial],
    most: int | None,
    submit: Callable[[Trial], Any],
    first: Callable[[list[Any]], Any],
    result: Callable[[Any], Trial],
) -> Generator[Trial, None, None]:
    """Keeps at most so many runs going; one whose process has failed has the error of that.

    Args:
        trials: The runs.
        most: Largest number at a time; None submits all at once.
        submit: Starts a run; returns a handle.
        first: The handle of a run that has ended, of several; waits for one.
        result: The result of a handle.
    """
    waiting, running = deque(trials), dict[Any, Trial]()
    while waiting or running:
        while waiting and (most is None or len(running) < most):
            trial = waiting.popleft()
            running[submit(trial)] = trial
        done = first(list(running))
        trial = running.pop(done)
        try:
            ended = result(done)
        except Exception as error:
            lines = str(error).split("\n")
            ended = replace(trial, error=(f"{type(error).__name__}: {lines[0]}", 1), code=1)
        yield ended


ENGINES: dict[str, Callable[[Any, Sequence[Trial], Spread], Generator[Trial, None, None]]] = {
    "joblib": _joblib,
    "ray": _ray,
    "submitit": _submitit,
}
"""The adapters, by the name of their package and of the extra that installs it."""
