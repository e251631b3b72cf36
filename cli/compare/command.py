"""`lit-lipschitz compare`: fits a config under several policies and seeds, and compares the results."""

import argparse
import copy
import hashlib
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lit_lipschitz import __version__
from lit_lipschitz.cli.compare.engines import ENGINES, Engine, Spread, find_engine, in_turn
from lit_lipschitz.cli.compare.policies import DEFAULT, ComparedPolicy, fit_options, parse_policies
from lit_lipschitz.cli.compare.results_file import ResultsFile
from lit_lipschitz.cli.compare.runs import Runs
from lit_lipschitz.cli.compare.summaries import summarize
from lit_lipschitz.cli.compare.trials import WITHOUT_EFFECT, Parsed, ParseOnly, Trial
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
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--engine", choices=[*ENGINES])
    parser.add_argument("--engine_options", default="{}")
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if options.seeds < 1:
        raise ConfigurationError(f"compare --seeds {options.seeds}: expected the number of seeds, at least 1")
    if options.jobs is not None and options.jobs < 1:
        raise ConfigurationError(f"compare --jobs {options.jobs}: expected the number of runs at a time, at least 1")
    try:
        settings = json.loads(options.engine_options)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ConfigurationError(
            f"compare --engine_options {options.engine_options}: expected JSON such as '{{\"num_cpus\": 2}}'"
        )
    options.engine_options = settings
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
        trials = _trials(options, config, typed, rest)
        code = Runs(trials, file).make(_engine(options, config))
        return code or _report(options, trials, typed, file)
    except LitLipschitzError as error:
        return fail(error)


def _trials(
    options: argparse.Namespace, config: dict[str, Any], typed: dict[ComparedPolicy, list[str]], rest: list[str]
) -> list[Trial]:
    """The runs, seed by seed."""
    start = config["seed_everything"]
    first = 0 if start is None or isinstance(start, bool) else int(start)
    hashes = {policy: _fingerprint(config, policy, own, options.metric) for policy, own in typed.items()}
    each = itertools.product(range(first, first + options.seeds), typed)
    return [
        Trial(number, policy, seed, hashes[policy], options.metric,
              ["fit", *rest, *typed[policy], "--seed_everything", str(seed)])
        for number, (seed, policy) in enumerate(each, 1)
    ]  # fmt: skip


def _engine(options: argparse.Namespace, config: dict[str, Any]) -> Engine:
    """What makes the runs, as the options have it: --jobs alone means joblib."""
    if options.engine is None and options.jobs in (None, 1):
        return in_turn
    trainer = config["trainer"]
    # With devices such as [3] the user has chosen one.
    ours = trainer["accelerator"] in ("auto", "gpu", "cuda") and str(trainer["devices"]) == "1"
    gpus = torch.cuda.device_count() if ours else 0
    folder = options.output.absolute().parent
    return find_engine(options.engine or "joblib", Spread(options.jobs, gpus, options.engine_options, folder))


def _fingerprint(config: dict[str, Any], policy: ComparedPolicy, typed: list[str], metric: str | None) -> str:
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


def _report(
    options: argparse.Namespace, trials: list[Trial], typed: dict[ComparedPolicy, list[str]], file: ResultsFile
) -> int:
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
