"""Makes the runs of `lit-lipschitz compare` that are not in its file; several processes may do so at the same time."""

import contextlib
import sys
from collections.abc import Iterator

from lit_lipschitz.cli.compare.engines import Engine
from lit_lipschitz.cli.compare.policies import ComparedPolicy
from lit_lipschitz.cli.compare.results_file import ResultsFile, Row
from lit_lipschitz.cli.compare.trials import Trial
from lit_lipschitz.cli.output import Busy


class Runs:
    """The runs of a comparison.

    Args:
        trials: All of them, in their order; each gets its row or its error.
        file: The file of the results.
    """

    def __init__(self, trials: list[Trial], file: ResultsFile) -> None:
        self._trials, self._file = trials, file
        self._claims: dict[int, contextlib.ExitStack] = {}  # of the runs that are being made, by number
        self._misconfigured: set[ComparedPolicy] = set()  # a mistake in the configuration is one for every seed

    def make(self, engine: Engine) -> int:
        """Makes the runs that are not in the file.

        A run that another process makes is left for later, and made only if that one ends without a result.

        Returns:
            0, or the exit code of a run that a signal has ended.

        Raises:
            LitLipschitzError: The file can't be written, or the engine has failed.
        """
        todo, wait = self._trials, False
        try:
            while todo:
                later: list[Trial] = []
                with contextlib.closing(engine(self._claimed(todo, later, wait))) as ended:
                    for result in ended:
                        if code := self._store(result):
                            return code
                todo, wait = later, True
        except KeyboardInterrupt:
            print(f"interrupted; the same command continues from {self._file.path}", file=sys.stderr)
            return 130
        finally:
            for claim in self._claims.values():
                claim.close()
        return 0

    def _claimed(self, trials: list[Trial], later: list[Trial], wait: bool) -> Iterator[Trial]:
        """The runs that this process is to make.

        Args:
            trials: Those without a result so far.
            later: Gets those that another process makes now.
            wait: Whether to wait for the first of these.
        """
        for trial in trials:
            claim = contextlib.ExitStack()
            try:
                if self._is_settled(trial):
                    continue
                claim.enter_context(self._file.claim(trial.key, wait))
                wait = False
                # Another process may have ended it since.
                if self._is_settled(trial):
                    claim.close()
                    continue
            except Busy:
                print(f"{self._title(trial)} another process makes it now", file=sys.stderr)
                later.append(trial)
                continue
            self._claims[trial.number] = claim
            yield trial

    def _is_settled(self, trial: Trial) -> bool:
        """Whether a run is in the file, or would fail as one with another seed has."""
        trial.row = self._file.rows().get(trial.key)
        if trial.row:
            print(f"{self._title(trial)} already in {self._file.path}", file=sys.stderr)
        return trial.row is not None or trial.policy in self._misconfigured

    def _store(self, result: Trial) -> int:
        """Keeps the result of a run; returns the exit code if a signal has ended it, or else 0."""
        trial = self._trials[result.number - 1]
        trial.row, trial.error, title = result.row, result.error, self._title(result)
        try:
            if trial.row:
                trial.row = self._file.add(trial.row)
                print(f"{title} {_line(trial.row)}", file=sys.stderr)
            elif trial.error:
                if trial.policy not in self._misconfigured:
                    print(f"{title} failed: {trial.error[0]}", file=sys.stderr)
                if trial.error[1] == 2:
                    self._misconfigured.add(trial.policy)
            else:
                print(f"{title} interrupted; the same command continues from {self._file.path}", file=sys.stderr)
                return result.code
        finally:
            self._claims.pop(trial.number).close()
        return 0

    def _title(self, trial: Trial) -> str:
        return f"[{trial.number}/{len(self._trials)}] {trial.policy.name}, seed {trial.seed}:"


def _line(row: Row) -> str:
    parts = [f"val_{row.metric} {row.val:.4f}"]
    parts += [f"test_{row.metric} {row.test:.4f}"] if row.test is not None else []
    parts += [f"(best {row.best_val:.4f} in epoch {row.best_epoch})" if row.best_epoch else "(no finite value)"]
    parts += [f"rate {row.rate_first:.4g} -> {row.rate_last:.4g}", f"{row.seconds:.1f} s"]
    return "  ".join([*parts, f"diverged, ended after epoch {row.epochs}"] if row.diverged else parts)
