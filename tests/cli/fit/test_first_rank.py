"""A rank whose first one has died ends by itself, wherever it waits."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

# The first rank starts another one, which waits, and waits as well.
FIRST = """
import subprocess, sys
from lit_lipschitz.cli.fit import first_rank
first_rank.end_with_first_rank()
import os
os.environ["LOCAL_RANK"] = sys.argv[2]
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
child.wait()
"""
RANK = """
import time
from lit_lipschitz.cli.fit import first_rank
first_rank.GRACE = 0.5
first_rank.end_with_first_rank()
print("ready", flush=True)
time.sleep(100)
"""


def runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("local_rank", "ends"), [("1", True), ("0", False)])
def test_a_rank_ends_some_time_after_the_process_that_started_it(local_rank, ends):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FIRST, RANK, local_rank]
    with open("errors.txt", "w") as errors:
        first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    with first.stdout:
        child = int(first.stdout.readline())
        assert first.stdout.readline() == "ready\n"
    try:
        first.kill()
        first.wait()
        limit = time.monotonic() + (60 if ends else 4)
        while runs(child) and time.monotonic() < limit:
            time.sleep(0.1)
        assert runs(child) != ends
        with open("errors.txt") as errors:
            assert errors.read().count("the first rank has died") == ends
    finally:
        if runs(child):
            os.kill(child, signal.SIGKILL)
