"""Faults of one rank of a run on two, and several writers of one file, for ``survive.py``."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from lit_lipschitz.cli.compare.results_file import ResultsFile, Row

PATIENCE = 120.0
"""Seconds within which a run must end once one of its ranks has died."""


def start_ranks(folder: Path, arguments: list[str], *more: str) -> subprocess.Popen[bytes]:
    """Starts the command on two ranks."""
    command = [sys.executable, "-m", "lit_lipschitz", *arguments, "--config", "ddp", *more]
    with (folder / "log.txt").open("ab") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def alive(process: int) -> bool:
    """Whether a process has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ranks_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The process of the first rank, and of the one that it has started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, check=False)
    children = [int(pid) for pid in listed.stdout.split()]
    commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in children if alive(pid)}
    return [process.pid, *(pid for pid, command in commands.items() if b"lit_lipschitz" in command.read_bytes())]


def fault(process: subprocess.Popen[bytes], kind: str, moment: float, chance: random.Random) -> list[int]:
    """Kills one rank after some seconds, or stops it for two; the ranks, or none if the second one does not run."""
    time.sleep(moment)
    ranks = ranks_of(process)
    if process.poll() is not None or len(ranks) < 2:
        return []
    rank = chance.choice(ranks)
    try:
        os.kill(rank, signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        if kind == "stopped":
            time.sleep(2)
            os.kill(rank, signal.SIGCONT)
    except ProcessLookupError:
        return []
    return ranks


def ended(process: subprocess.Popen[bytes], ranks: list[int]) -> int | None:
    """The exit code of a run all of whose ranks have ended in time; None where one is left, which is killed."""
    limit = time.monotonic() + PATIENCE
    code = None
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        ranks = [*ranks, process.pid]
    while any(map(alive, ranks)) and time.monotonic() < limit:
        time.sleep(0.05)
    left = [rank for rank in ranks if alive(rank)]
    for rank in left:
        os.kill(rank, signal.SIGKILL)
    process.wait()
    return None if left else code


def rank_faults(
    root: Path,
    count: int,
    arguments: Callable[[Path], list[str]],
    resumable: Callable[[Path], bool],
    state: Callable[[Path], dict[str, object]],
    differences: Callable[[object, object], list[str]],
    chance: random.Random,
) -> bool:
    """Kills one of two ranks, or stops it for a while, at random moments, and prints; whether all was as it has to be.

    A run with a rank that died must end, be resumed, and end as the undisturbed one; one with a rank that was stopped
    must go on as if it had not been.
    """
    whole = root / "ranks"
    whole.mkdir()
    began = time.monotonic()
    if ended(start_ranks(whole, arguments(whole)), []):
        sys.exit((whole / "log.txt").read_text()[-3000:])
    length, expected = time.monotonic() - began, state(whole)
    right = True
    for kind in ("killed", "stopped") if count else ():
        counts: Counter[str] = Counter()
        while counts["tries"] < count:
            folder = root / f"ranks_{kind}{counts['tries']}_{counts['drawn again']}"
            folder.mkdir()
            process = start_ranks(folder, arguments(folder))
            ranks = fault(process, kind, chance.uniform(0, length), chance)
            code = ended(process, ranks)
            finished = kind == "killed" and code == 0 and not differences(expected, state(folder))
            if not ranks or finished:  # the rank was at its end: it had nothing more to do
                counts["drawn again"] += 1
                continue
            counts["tries"] += 1
            counts["ended"] += code is not None and (code != 0) == (kind == "killed")
            if code != 0:
                resume = ("--ckpt_path", "last") if resumable(folder) else ()
                code = ended(start_ranks(folder, arguments(folder), *resume), [])
            found = differences(expected, state(folder)) if code == 0 else [f"exit code {code}"]
            counts["same"] += not found
            if found:
                print(f"a rank was {kind}: DIFFERENT: {', '.join(found[:4])}", flush=True)
        print(
            f"rank faults, one of two {kind}: {counts['tries']} runs; {counts['ended']} "
            f"{'ended on the other rank too' if kind == 'killed' else 'went on'}; {counts['same']} ended as the "
            "undisturbed one, bit for bit: "
            f"{'nothing lost' if (good := counts['ended'] == counts['same'] == count) else 'LOST'}",
            flush=True,
        )
        right = right and good
    return right


def add_rows(path: Path, writer: int, rows: int, output: int) -> None:
    """Adds rows to a file, and writes the number of each that is in it."""
    results = ResultsFile(path)
    for seed in range(rows):
        results.add(Row(f"writer{writer}", seed, "abc", "acc", 0.5, 0.5, 0.5, 1, 1, 0.1, 0.1, 1.0, False))
        os.write(output, f"{writer} {seed}\n".encode())


def writers_raced(root: Path, races: int, chance: random.Random, writers: int = 4, rows: int = 40) -> bool:
    """Several processes write one file while one of them is killed; prints, and returns whether all is there."""
    counts: Counter[str] = Counter()
    for number in range(races):
        folder = root / f"race{number}"
        folder.mkdir()
        path, done = folder / "compare.csv", folder / "done"
        output = os.open(done, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        began = time.monotonic()
        processes = []
        for writer in range(writers):
            processes.append(os.fork())
            if not processes[-1]:
                code = 1
                try:
                    add_rows(path, writer, rows, output)
                    code = 0
                finally:
                    os._exit(code)
        time.sleep(chance.uniform(0, 0.5))
        victim = chance.randrange(writers)
        os.kill(processes[victim], signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        os.close(output)
        reported = {(f"writer{line.split()[0]}", int(line.split()[1])) for line in done.read_text().splitlines()}
        kept = {(row.policy, row.seed) for row in ResultsFile(path).rows().values()}
        others = [code for writer, code in enumerate(codes) if writer != victim]
        counts["reported"] += len(reported)
        counts["kept"] += len(reported & kept)
        counts["whole"] += reported <= kept and not any(others) and len(kept) >= (writers - 1) * rows
        counts["seconds"] += round(time.monotonic() - began)
    good = counts["whole"] == races
    print(
        f"writers raced: {races} races of {writers} writers of one file, one of which is killed; {counts['kept']} of "
        f"{counts['reported']} written rows are there: {'nothing lost' if good else 'LOST'}",
        flush=True,
    )
    return good
