"""`lit-lipschitz compare`: fits a config under several policies and seeds, and compares the results."""

import argparse
import copy
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_lipschitz import __version__
from lit_lipschitz.cli.compare.policies import DEFAULT, Policy, fit_options, parse_policies
from lit_lipschitz.cli.compare.results_file import ResultsFile, Row
from lit_lipschitz.cli.compare.summaries import summarize
from lit_lipschitz.cli.compare.trials import WITHOUT_EFFECT, Parsed, ParseOnly, Trial, run_trial
from lit_lipschitz.cli.compare.verdict import print_summaries, verdict
from lit_lipschitz.cli.fit.command import run
from lit_lipschitz.cli.help import OptionParser
from lit_lipschitz.cli.output import fail, to_json
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError


def parse_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the arguments into the options of compare and those of fit.

    Raises:
        ConfigurationError: There is a mistake in the options of compare.
    """
    parser = OptionParser("compare")
    parser.add_argument("--policies", default=DEFAULT)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", default="compare.csv", type=Path)
    parser.add_argument("--metric")
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if options.seeds < 1:
        raise ConfigurationError(f"compare --seeds {options.seeds}: expected the number of seeds, at least 1")
    return options, rest


def compare(arguments: list[str]) -> int:
    """Runs `lit-lipschitz compare` with the arguments after its name.

    Returns:
        The exit code: 1 if a policy has failed, and 2 if all have for the same mistake in the configuration.
    """
    try:
        options, rest = parse_options(arguments)
        policies = parse_policies(options.policies)
        file = ResultsFile(options.output)
        try:
            return run(ParseOnly, ["fit", *rest])
        except Parsed as parsed:
            config = parsed.config
        typed = {policy: fit_options(policy, config["model"]) for policy in policies}
        trials = _trials(options, config, typed)
        code = _run_missing(trials, file, {policy: [*rest, *typed[policy]] for policy in policies})
        return code or _report(options, trials, typed, file)
    except LitLipschitzError as error:
        return fail(error)


def _trials(options: argparse.Namespace, config: dict[str, Any], typed: dict[Policy, list[str]]) -> list[Trial]:
    """The runs, seed by seed."""
    seed = config["seed_everything"]
    first = 0 if seed is None or isinstance(seed, bool) else int(seed)
    hashes = {policy: _fingerprint(config, policy, own, options.metric) for policy, own in typed.items()}
    return [Trial(policy, first + i, hashes[policy], options.metric) for i in range(options.seeds) for policy in typed]


def _fingerprint(config: dict[str, Any], policy: Policy, typed: list[str], metric: str | None) -> str:
    """A short hash of everything that a run's result depends on, except the seed."""
    config = copy.deepcopy(config)
    for name in ("seed_everything", "checkpoint", "fixed_rate", "config"):
        config.pop(name, None)
    for name in WITHOUT_EFFECT:
        config["trainer"].pop(name, None)
    if policy.rate is not None:
        config["lipschitz"] = config["lipschitz"].get("optimizers")
    text = json.dumps([__version__, config, policy.name, typed, metric], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _run_missing(trials: list[Trial], file: ResultsFile, arguments: dict[Policy, list[str]]) -> int:
    """Makes the runs that are not in the file; returns 0, or the exit code of a run that a signal has ended."""
    misconfigured: set[Policy] = set()  # a mistake in the configuration is one for every seed
    for number, trial in enumerate(trials, 1):
        title = f"[{number}/{len(trials)}] {trial.policy.name}, seed {trial.seed}:"
        trial.row = file.rows().get((trial.policy.name, trial.seed, trial.config))
        if trial.row:
            print(f"{title} already in {file.path}", file=sys.stderr)
            continue
        if trial.policy in misconfigured:
            continue
        code = run_trial(trial, ["fit", *arguments[trial.policy], "--seed_everything", str(trial.seed)])
        if trial.row:
            file.add(trial.row)
            print(f"{title} {_line(trial.row)}", file=sys.stderr)
        elif trial.error:
            print(f"{title} failed: {trial.error[0]}", file=sys.stderr)
            if trial.error[1] == 2:
                misconfigured.add(trial.policy)
        else:
            print(f"{title} interrupted; the same command continues from {file.path}", file=sys.stderr)
            return code
    return 0


def _line(row: Row) -> str:
    parts = [f"val_{row.metric} {row.val:.4f}"]
    parts += [f"test_{row.metric} {row.test:.4f}"] if row.test is not None else []
    parts += [f"(best {row.best_val:.4f} in epoch {row.best_epoch})" if row.best_epoch else "(no finite value)"]
    parts += [f"rate {row.rate_first:.4g} > {row.rate_last:.4g}", f"{row.seconds:.1f} s"]
    return "  ".join([*parts, f"diverged, ended after epoch {row.epochs}"] if row.diverged else parts)


def _report(options: argparse.Namespace, trials: list[Trial], typed: dict[Policy, list[str]], file: ResultsFile) -> int:
    """Prints the results; returns the exit code."""
    rows = [trial.row for trial in trials if trial.row]
    errors = {trial.policy.name: trial.error for trial in trials if trial.error}
    if not rows:
        codes = dict(errors.values())
        return fail("; ".join(codes), max(codes.values()) if len(codes) == 1 else 1)
    found = summarize(rows, list(typed))
    failures = {name: line for name, (line, _) in errors.items()}
    if options.json:
        content = {
            "runs": [asdict(row) for row in rows],
            "policies": [one.plain for one in found],
            "failed": failures,
            "options": {policy.name: own for policy, own in typed.items()},
            "answer": verdict(found),
            "file": str(file.path),
        }
        print(to_json(content, indent=1))
    else:
        print_summaries(found, failures, verdict(found))
    return 1 if failures else 0
