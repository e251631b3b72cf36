"""Files that several processes write, and locks: nothing is lost, half written or left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import race

from lit_lipschitz.cli.output import Busy, free_path, locked, write_whole

# Waits until all of the processes have imported what they need.
START = """
import os, sys, time
from pathlib import Path
def start(number, count):
    Path(f"ready{number}").touch()
    while len(list(Path(".").glob("ready*"))) < count:
        time.sleep(0.001)
"""
WRITE = f"""{START}
from lit_lipschitz.cli.output import write_whole
number, count, times = map(int, sys.argv[1:])
start(number, count)
for _ in range(times):
    write_whole(Path("file"), b"%d" % number * 100_000)
    content = Path("file").read_bytes()
    assert len(content) == 100_000 and len(set(content)) == 1
"""
COUNT = f"""{START}
from lit_lipschitz.cli.output import locked
number, count, times = map(int, sys.argv[1:])
start(number, count)
for _ in range(times):
    with locked(Path("number")):
        value = int(Path("number").read_text())
        time.sleep(0.0005)
        Path("number").write_text(str(value + 1))
"""
HOLD = """
import sys, time
from pathlib import Path
from lit_lipschitz.cli.output import locked
with locked(Path("file")):
    print("held", flush=True)
    time.sleep(600)
"""


def names():
    return sorted(path.name for path in Path(".").iterdir() if not path.name.startswith("ready"))


def test_of_several_writers_of_a_file_none_fails_and_readers_see_a_whole_one():
    for run in race(*(["-c", WRITE, number, 4, 40] for number in range(4))):
        assert run.returncode == 0, run.stderr
    assert names() == ["file"]


def test_a_lock_admits_one_process_at_a_time():
    Path("number").write_text("0")
    for run in race(*(["-c", COUNT, number, 4, 40] for number in range(4))):
        assert run.returncode == 0, run.stderr
    assert Path("number").read_text() == "160"
    assert names() == ["number"]


def test_a_killed_process_leaves_no_lock_that_holds():
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Busy), locked(Path("file"), wait=False):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with locked(Path("file")):
        assert names() == [".file.lock"]
    assert names() == []


def test_what_a_kill_has_left_of_a_file_goes_and_what_another_process_writes_now_stays():
    for name, age in ((".file.old.part", 7200), (".file.new.part", 5), (".file2.old.part", 7200)):
        Path(name).touch()
        os.utime(name, (time.time() - age,) * 2)
    write_whole(Path("file"), b"new")
    assert names() == [".file.new.part", ".file2.old.part", "file"]


def test_a_free_path_is_not_there_yet():
    assert free_path(Path("a.csv")) == Path("a.csv")
    Path("a.csv").touch()
    Path("a-v1.csv").symlink_to("nowhere")
    assert free_path(Path("a.csv")) == Path("a-v2.csv")
    assert free_path(Path("b")) == Path("b")
