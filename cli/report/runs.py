"""Finds the runs in some folders and reads their curves, one value an epoch. Imports no torch and no numpy."""

import csv
import io
import os
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_lipschitz.cli.configs import check_yaml
from lit_lipschitz.cli.output import printable
from lit_lipschitz.cli.report.event_files import read_events
from lit_lipschitz.errors import ConfigurationError

_EVENT_FILES = "events.out.tfevents.*"
_CSV_FILE = "metrics.csv"
_WANTED = f"{_EVENT_FILES} (TensorBoardLogger) or {_CSV_FILE} (CSVLogger)"
_MAX_STEP = 1 << 53  # beyond it a float does not hold all whole numbers
_ADVICE = "pass a run's folder, such as lightning_logs/version_0, or a folder above some runs"


@dataclass
class Run:
    """A run and its curves."""

    name: str  # in figures
    folder: Path
    curves: dict[str, dict[int, float]] = field(default_factory=dict)  # tag to {epoch from 1: its last value}
    notes: list[str] = field(default_factory=list)  # what could not be read

    @property
    def epochs(self) -> int:
        """The last epoch with a value of training or validation."""
        return max((max(curve) for tag, curve in self.curves.items() if not tag.startswith("test_")), default=0)

    def last(self, tag: str) -> float | None:
        """The last value of a curve, or None if there is no such curve."""
        curve = self.curves.get(tag)
        return curve[max(curve)] if curve else None


def find_runs(paths: list[str]) -> list[Run]:
    """The runs in some folders and below, each once, with different names.

    Raises:
        ConfigurationError: A folder does not exist, or has no run with curves.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        found = [read_run(folder) for folder in _run_folders(Path(path))]
        if not any(run.curves for run in found):
            reason = "; ".join(note for run in found for note in run.notes) or "nothing has been logged there yet"
            folders = f"{found[0].folder}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            raise ConfigurationError(
                f"report {path}: looked for curves and found event files without any in {folders}: {reason}; wait for "
                "the first epoch's end, or pass another run"
            )
        runs.update((run.folder.resolve(), run) for run in found)
    for run, name in zip(runs.values(), _names_by_settings(list(runs)) or _names(list(runs)), strict=True):
        run.name = printable(name)
        if not run.curves:
            run.notes.append("no curves yet: left out")
    return list(runs.values())


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        found = "a file, not a folder" if path.exists() else "no such folder"
        raise ConfigurationError(f"report {path}: looked for {_WANTED}, found {found}; {_ADVICE}")
    prefix = _EVENT_FILES.rstrip("*")
    folders = [
        Path(root) for root, _, files in os.walk(path) if any(f == _CSV_FILE or f.startswith(prefix) for f in files)
    ]
    if folders:
        return sorted(folders, key=lambda folder: [_natural(part) for part in folder.parts])
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    entries = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    found = (
        f"{len(names)} other {'entry' if len(names) == 1 else 'entries'} ({entries})" if names else "an empty folder"
    )
    raise ConfigurationError(f"report {path}: looked for {_WANTED} there and below, found {found}; {_ADVICE}")


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts version_10 after version_9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text) if part]


def _names(folders: list[Path]) -> list[str]:
    """The parts of the folders' paths that differ, without `lightning_logs` if they differ without it."""
    if len(folders) == 1:
        return [folders[0].name]
    shared = len(Path(os.path.commonpath(folders)).parts)
    # A run's folder that contains the others shares all its parts with them.
    shared -= any(len(folder.parts) == shared for folder in folders)
    rest = [folder.parts[shared:] for folder in folders]
    short = [tuple(part for part in parts if part != "lightning_logs") for parts in rest]
    usable = len(set(short)) == len(short) and all(short)
    return ["/".join(parts) for parts in (short if usable else rest)]


_UNNAMED = (
    "config",
    "ckpt_path",
    "trainer.default_root_dir",
    "trainer.logger",
    "trainer.devices",
    "checkpoint.dirpath",
)
_MAX_NAME = 60
"""Settings that name no run, and the characters of a name."""


def _names_by_settings(folders: list[Path]) -> list[str] | None:
    """Names made of the settings that differ between the runs; None if they do not tell them apart."""
    settings = [_settings(folder) for folder in folders]
    keys = dict.fromkeys(key for one in settings for key in one if not key.startswith(_UNNAMED))
    differing = [key for key in keys if len({one.get(key) for one in settings}) > 1]
    chosen = [key for key in differing if _tells(key, differing, settings)]
    names = [" ".join(f"{_short_key(key, chosen)}={one[key]}" for key in chosen if key in one) for one in settings]
    usable = len(folders) > 1 and all(settings) and len(set(names)) == len(names)
    return names if usable and all(0 < len(name) <= _MAX_NAME for name in names) else None


def _tells(key: str, differing: list[str], settings: list[dict[str, str]]) -> bool:
    """Whether a setting differs between runs that have the same class, if it is an argument of one."""
    classes = [other for other in differing if key.startswith(f"{other}.")]
    values: dict[tuple[str | None, ...], set[str | None]] = {}
    for one in settings:
        values.setdefault(tuple(one.get(name) for name in classes), set()).add(one.get(key))
    return any(len(found) > 1 for found in values.values())


def _short_key(key: str, others: list[str]) -> str:
    """The last part of a setting's key, or all of it where another ends alike."""
    last = key.rpartition(".")[2]
    return last if [other.rpartition(".")[2] for other in others].count(last) == 1 else key


def _settings(folder: Path) -> dict[str, str]:
    """The settings in a run's newest saved configuration; empty without a readable one."""
    files = sorted(folder.glob("config*.yaml"), key=lambda file: _natural(file.name.replace("config.", "config-v0.")))
    try:
        content = check_yaml(files[-1].read_text(encoding="utf-8"), str(files[-1])) if files else None
    except Exception:  # the folder's name does as well
        return {}
    return dict(_flat("", content)) if isinstance(content, dict) else {}


def _flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(key if name in ("class_path", "init_args") else f"{key}.{name}".lstrip("."), inner)
    else:
        yield key, str(value).rpartition(".")[2] if str(value).replace(".", "").isidentifier() else str(value)


def read_run(folder: Path) -> Run:
    """Reads the curves in a folder; damaged files are noted, and read up to the damage."""
    run = Run(folder.name, folder)
    points: dict[str, dict[int, tuple[int, float]]] = {}  # tag to {step: (epoch, value)}
    if (folder / _CSV_FILE).is_file():
        for step, epoch, tag, value in _read_csv(folder / _CSV_FILE, run.notes):
            points.setdefault(_usual_tag(tag), {})[step] = (epoch, value)
    logged: dict[str, dict[int, float]] = {}
    # The second part of a file's name is the time: what a resumed run logs again replaces earlier values.
    for path in sorted(folder.glob(_EVENT_FILES), key=lambda file: (_natural(file.name), file.name)):
        if path.exists() and not (
            path.is_file() or path.is_dir()
        ):  # reading one of these, such as a FIFO, may wait for ever
            run.notes.append(f"{path.name} is no regular file: left out")
            continue
        for step, tag, value in read_events(path, run.notes):
            logged.setdefault(_usual_tag(tag), {})[step] = value
    epochs = _Epochs(logged, run.notes)
    for tag, curve in logged.items():
        points[tag] = {step: (epochs.of(step), value) for step, value in curve.items()}
    for tag, steps in sorted(points.items()):
        if tag not in ("epoch", "step", "hp_metric"):
            run.curves[tag] = {steps[step][0] + 1: steps[step][1] for step in sorted(steps)}
    return run


class _Epochs:
    """The epoch of each step: from the logged `epoch`, or else from a metric that is logged once an epoch."""

    def __init__(self, logged: dict[str, dict[int, float]], notes: list[str]) -> None:
        found = logged.get("epoch", {})
        known = {step: int(epoch) for step, epoch in found.items() if 0 <= epoch < _MAX_STEP}
        _note_impossible(len(found) - len(known), notes)
        if not known:
            names = ("val_loss", "val_acc", "train_loss", "train_acc", *logged)
            tag = next((name for name in names if name in logged), None)
            known = {step: i for i, step in enumerate(sorted(logged[tag]))} if tag else {0: 0}
        self._steps = sorted(known)
        self._epochs = [known[step] for step in self._steps]

    def of(self, step: int) -> int:
        """The epoch of the next step whose epoch is known, or of the last one."""
        return self._epochs[min(bisect_left(self._steps, step), len(self._steps) - 1)]


def _usual_tag(tag: str) -> str:
    """This project's name for a curve that other modules call `train/loss`, `val_accuracy` or `train_loss_epoch`."""
    tag = printable(tag)
    name = re.sub(r"^valid(?:ation)?(?=[_/])", "val", tag)
    match = re.fullmatch(r"(train|val|test)[_/](loss|acc|accuracy)(?:_epoch)?", name)
    return f"{match[1]}_{match[2][:4].replace('accu', 'acc')}" if match else tag


def _note_impossible(count: int, notes: list[str]) -> None:
    if count:
        notes.append(f"{count} points whose epoch or step is not finite or is negative: left out")


def _read_csv(path: Path, notes: list[str]) -> Iterator[tuple[int, int, str, float]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # of all readers
    # The last line may be incomplete.
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    impossible = 0
    try:
        for i, row in enumerate(rows):
            step, epoch = (
                i if number is None else number for number in map(_number, (row.get("step"), row.get("epoch")))
            )
            values = [(tag, _number(cell)) for tag, cell in row.items() if tag not in ("step", "epoch", None)]
            if not (0 <= epoch < _MAX_STEP and abs(step) < _MAX_STEP):
                impossible += any(value is not None for _, value in values)
                continue
            yield from ((int(step), int(epoch), tag, value) for tag, value in values if value is not None)
    except csv.Error as error:
        notes.append(f"{path.name} is damaged: what comes after line {rows.line_num} is left out ({error})")
    _note_impossible(impossible, notes)


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None
