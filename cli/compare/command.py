"""`lit-lipschitz compare`: fits of a config under several policies and seeds, and what there is to say of them."""

import argparse
import copy
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from lit_lipschitz import __version__
from lit_lipschitz.cli.compare.policies import DEFAULT, Policy, options, parse_policies
from lit_lipschitz.cli.compare.results_file import Ledger, Row, finite
from lit_lipschitz.cli.compare.trials import IDLE, Plan, Planned, Trial, make
from lit_lipschitz.cli.compare.verdict import answer, show, summaries
from lit_lipschitz.cli.fit.command import run
from lit_lipschitz.cli.main import fail
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"compare: {message}; lit-lipschitz compare --help tells more")


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of compare, and those of fit."""
    parser = _Parser("lit-lipschitz compare", allow_abbrev=False, add_help=False)
    parser.add_argument("--policies", default=DEFAULT)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", default="compare.csv", type=Path)
    parser.add_argument("--metric")
    parser.add_argument("--json", action="store_true")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.seeds < 1:
        raise ConfigurationError(f"compare --seeds {chosen.seeds}: expected the number of seeds, at least 1")
    return chosen, rest


def compare(arguments: list[str]) -> int:
    """Runs the command.

    Args:
        arguments: What comes after its name.

    Returns:
        The exit code: 1 if a policy has failed, and 2 if all have for the same mistake in the configuration.
    """
    try:
        chosen, rest = _parse(arguments)
        policies = parse_policies(chosen.policies)
        ledger = Ledger(chosen.output)
        try:
            return run(Plan, ["fit", *rest])
        except Planned as planned:
            config = planned.config
        return _compare(chosen, policies, ledger, config, rest)
    except LitLipschitzError as error:
        return fail(error, 2 if isinstance(error, ConfigurationError) else 1)


def _compare(
    chosen: argparse.Namespace, policies: list[Policy], ledger: Ledger, config: dict[str, Any], rest: list[str]
) -> int:
    seed = config["seed_everything"]
    base = 0 if seed is None or isinstance(seed, bool) else int(seed)
    typed = {policy: options(policy, config["model"]) for policy in policies}
    trials = [
        Trial(policy, base + i, fingerprint(config, policy, typed[policy], chosen.metric), chosen.metric)
        for i in range(chosen.seeds)
        for policy in policies
    ]
    code = _work(trials, ledger, {policy: [*rest, *typed[policy]] for policy in policies})
    if code:
        return code
    rows = [trial.row for trial in trials if trial.row]
    failures = {trial.policy.name: trial.error for trial in trials if trial.error}
    if not rows:
        lines = {error[0]: error[1] for error in failures.values()}
        return fail("; ".join(lines), max(lines.values()) if len(lines) == 1 else 1)
    found = summaries(rows, policies)
    said = answer(found)
    if chosen.json:
        account = {
            "runs": [
                {name: finite(v) if isinstance(v, float) else v for name, v in asdict(row).items()} for row in rows
            ],
            "policies": [one.plain() for one in found],
            "failed": {name: error[0] for name, error in failures.items()},
            "options": {policy.name: typed[policy] for policy in policies},
            "answer": said,
            "file": str(ledger.path),
        }
        print(json.dumps(account, indent=1))
    else:
        show(found, {name: error[0] for name, error in failures.items()}, said)
    return 1 if failures else 0


def fingerprint(config: dict[str, Any], policy: Policy, typed: list[str], metric: str | None) -> str:
    """A short hash of what a run's result depends on, but for the seed.

    Args:
        config: The configuration of fit.
        policy: The policy.
        typed: The options that make the policy.
        metric: The metric that was asked for.
    """
    config = copy.deepcopy(config)
    for name in ("seed_everything", "checkpoint", "fixed_rate", "config"):
        config.pop(name, None)
    for name in IDLE:
        config["trainer"].pop(name, None)
    if policy.rate is not None:
        config["lipschitz"] = config["lipschitz"].get("optimizers")
    text = json.dumps([__version__, config, policy.name, typed, metric], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _work(trials: list[Trial], ledger: Ledger, arguments: dict[Policy, list[str]]) -> int:
    """Makes the runs that the file does not have; returns 0, or the exit code of a run that a signal has ended."""
    failed: dict[Policy, tuple[str, int]] = {}
    for number, trial in enumerate(trials, 1):
        title = f"[{number}/{len(trials)}] {trial.policy.name}, seed {trial.seed}:"
        trial.row = ledger.rows().get((trial.policy.name, trial.seed, trial.config))
        if trial.row:
            print(f"{title} stands in {ledger.path}", file=sys.stderr)
            continue
        if trial.policy in failed:
            continue  # what is wrong with the configuration is wrong with it for every seed
        code = make(trial, ["fit", *arguments[trial.policy], "--seed_everything", str(trial.seed)])
        if trial.row:
            ledger.add(trial.row)
            print(f"{title} {_line(trial.row)}", file=sys.stderr)
        elif trial.error:
            print(f"{title} failed: {trial.error[0]}", file=sys.stderr)
            if trial.error[1] == 2:
                failed[trial.policy] = trial.error
        else:
            print(f"{title} interrupted; the same command goes on from {ledger.path}", file=sys.stderr)
            return code
    return 0


def _line(row: Row) -> str:
    parts = [
        f"val_{row.metric} {row.val:.4f}",
        *([f"test_{row.metric} {row.test:.4f}"] if row.test is not None else []),
    ]
    best = f"best {row.best_val:.4f} in epoch {row.best_epoch}" if row.best_epoch else "no finite value"
    diverged = [f"diverged, ended after epoch {row.epochs}"] if row.diverged else []
    return "  ".join([*parts, f"({best})", f"rate {row.rate_first:.4g} > {row.rate_last:.4g}", f"{row.seconds:.1f} s",
                      *diverged])  # fmt: skip
