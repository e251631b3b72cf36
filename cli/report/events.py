"""Reads the curves of runs: TensorBoard's event files and CSVLogger's metrics.csv. Imports no torch and no numpy."""

import csv
import os
import re
import struct
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_lipschitz.errors import ConfigurationError

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

EVENT_FILES = "events.out.tfevents.*"
CSV_FILE = "metrics.csv"
_WANTED = f"{EVENT_FILES} (TensorBoardLogger) or {CSV_FILE} (CSVLogger)"
_ADVICE = "pass a run's folder, such as lightning_logs/version_0, or a folder above some runs"

Points = list[tuple[int, int, float]]
"""Step, epoch or -1 where none is known, and value, in the order of the steps."""


@dataclass
class Run:
    """A run and its curves.

    Attributes:
        name: What it is called in figures.
        folder: Where its files are.
        curves: Tag to {epoch: the last value of that epoch}; epochs count from 1.
        notes: What could not be read.
    """

    name: str
    folder: Path
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def epochs(self) -> int:
        """Epochs that have left a value of training or validation."""
        return max((max(curve) for tag, curve in self.curves.items() if not tag.startswith("test_")), default=0)

    def last(self, tag: str) -> float | None:
        """The last value of a curve, or None where there is no such curve."""
        curve = self.curves.get(tag)
        return curve[max(curve)] if curve else None


# -- finding runs ------------------------------------------------------------------------------------------------------


def find_runs(paths: list[str]) -> list[Run]:
    """The runs in some folders, each once, with names that tell them apart.

    Args:
        paths: Folders of runs, or folders above some.

    Raises:
        ConfigurationError: A folder is none, or has no run with curves.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        found = [read_run(folder) for folder in _run_folders(Path(path))]
        whole = [run for run in found if run.curves]
        if not whole:
            reason = "; ".join(note for run in found for note in run.notes) or "nothing has been logged there yet"
            folders = f"{found[0].folder}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            raise ConfigurationError(
                f"report {path}: looked for curves and found event files without any in {folders}: {reason}; wait for "
                "the first epoch's end, or pass another run"
            )
        runs.update((run.folder.resolve(), run) for run in found)
    for run in runs.values():
        if not run.curves:
            run.notes.append("no curves yet: left out")
    for folder, name in zip(runs, _names(list(runs)), strict=True):
        runs[folder].name = name
    return list(runs.values())


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        found = "a file, not a folder" if path.exists() else "no such folder"
        raise ConfigurationError(f"report {path}: looked for {_WANTED}, found {found}; {_ADVICE}")
    folders = [Path(root) for root, _, files in os.walk(path) if _run_files(files)]
    if folders:
        # version_10 comes after version_9.
        return sorted(folders, key=lambda folder: [_natural(part) for part in folder.parts])
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    found = f"{len(names)} other entries ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    found = found.replace("1 other entries", "1 other entry") if len(names) == 1 else found
    raise ConfigurationError(
        f"report {path}: looked for {_WANTED} there and below, found {found if names else 'an empty folder'}; {_ADVICE}"
    )


def _run_files(names: list[str]) -> list[str]:
    return [name for name in names if name == CSV_FILE or name.startswith(EVENT_FILES.rstrip("*"))]


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text) if part]


def _names(folders: list[Path]) -> list[str]:
    """The parts of the folders' paths that differ, without `lightning_logs` where they differ without it."""
    if len(folders) == 1:
        return [folders[0].name]
    shared = len(Path(os.path.commonpath(folders)).parts)
    # A run that lies above the others shares all its parts with them.
    shared -= any(len(folder.parts) == shared for folder in folders)
    rest = [folder.parts[shared:] for folder in folders]
    short = [tuple(part for part in parts if part != "lightning_logs") for parts in rest]
    usable = len(set(short)) == len(short) and all(short)
    return ["/".join(parts) for parts in (short if usable else rest)]


# -- reading one -------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """Reads the curves in a folder; what is damaged is left out, and noted unless it is the end of a file."""
    run = Run(folder.name, folder)
    points: dict[str, dict[int, tuple[int, float]]] = {}
    if (folder / CSV_FILE).is_file():
        for step, epoch, tag, value in _read_csv(folder / CSV_FILE):
            points.setdefault(_tag(tag), {})[step] = (epoch, value)
    logged: dict[str, dict[int, float]] = {}
    # The second part of a file's name is the time; what a resumed run logs again goes before.
    for path in sorted(folder.glob(EVENT_FILES), key=lambda file: (_natural(file.name), file.name)):
        for step, tag, value in read_events(path, run.notes):
            logged.setdefault(_tag(tag), {})[step] = value
    epochs = _Epochs(logged)
    for tag, curve in logged.items():
        points[tag] = {step: (epochs.of(step), value) for step, value in curve.items()}
    for tag, steps in sorted(points.items()):
        if tag not in ("epoch", "step", "hp_metric"):
            run.curves[tag] = {steps[step][0] + 1: steps[step][1] for step in sorted(steps)}
    return run


class _Epochs:
    """Which epoch a step belongs to, by what was logged: `epoch`, or else one value of the validation an epoch."""

    def __init__(self, logged: dict[str, dict[int, float]]) -> None:
        known = {step: int(epoch) for step, epoch in logged.get("epoch", {}).items()}
        if not known:
            names = ("val_loss", "val_acc", "train_loss", "train_acc", *logged)
            tag = next((name for name in names if name in logged), None)
            known = {step: i for i, step in enumerate(sorted(logged[tag]))} if tag else {0: 0}
        self._steps = sorted(known)
        self._epochs = [known[step] for step in self._steps]

    def of(self, step: int) -> int:
        """The epoch of the first step from this one on whose epoch is known; of the last one after that."""
        return self._epochs[min(bisect_left(self._steps, step), len(self._steps) - 1)]


def _tag(tag: str) -> str:
    """The project's name for a curve that other modules call `train/loss`, `val_accuracy` or `train_loss_epoch`."""
    name = re.sub(r"^valid(?:ation)?(?=[_/])", "val", tag)
    match = re.fullmatch(r"(train|val|test)[_/](loss|acc|accuracy)(?:_epoch)?", name)
    return f"{match[1]}_{match[2][:4].replace('accu', 'acc')}" if match else tag


def _read_csv(path: Path) -> Iterator[tuple[int, int, str, float]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    # Without its line's end, the last number may be a part of one.
    lines = text[: text.rfind("\n") + 1].splitlines()
    for i, row in enumerate(csv.DictReader(lines)):
        step, epoch = _number(row.get("step")), _number(row.get("epoch"))
        for tag, cell in row.items():
            value = _number(cell)
            if value is not None and tag not in ("step", "epoch", None):
                yield int(i if step is None else step), int(i if epoch is None else epoch), tag, value


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


# -- TensorBoard's files -----------------------------------------------------------------------------------------------


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def masked_crc(data: bytes) -> int:
    """The checksum of the record format: CRC-32C, rotated and shifted."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(path: Path, notes: list[str]) -> Iterator[tuple[int, str, float]]:
    """Step, tag and value of the scalars in an event file, up to the first record that is damaged or a part of one.

    TensorBoard's own reader takes seconds to import. A record is its length (8 bytes), a checksum of that (4), the
    data, and a checksum of them (4). The lengths alone are checked: what interrupts a run damages them with the data.

    Args:
        path: The file.
        notes: Takes in what is left out of a file that goes on after it.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    size = path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:
            length, checksum = struct.unpack("<QI", header)
            at = file.tell() - 12
            whole = checksum == masked_crc(header[:8])
            if whole and at + 16 + length > size:
                return  # it is being written
            try:
                event = Event.FromString(file.read(length + 4)[:-4]) if whole else None
            except DecodeError:
                event = None
            if event is None:
                notes.append(f"{path.name} is damaged: what comes after {at} of its {size} bytes is left out")
                return
            yield from _scalars(event)


def _scalars(event: "Event") -> Iterator[tuple[int, str, float]]:
    for value in event.summary.value:
        kind = value.WhichOneof("value")
        if kind == "simple_value":
            yield event.step, value.tag, value.simple_value
        elif kind == "tensor" and value.metadata.plugin_data.plugin_name in ("", "scalars"):
            tensor = value.tensor
            if len(tensor.float_val) == 1:
                yield event.step, value.tag, tensor.float_val[0]
            elif tensor.dtype == 1 and len(tensor.tensor_content) == 4:
                yield event.step, value.tag, struct.unpack("<f", tensor.tensor_content)[0]
