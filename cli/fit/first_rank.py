"""Ends a rank that the first one has started and left: one that waits for it to begin would wait for half an hour."""

import os
import sys
import threading
import time

GRACE = 30.0
"""Seconds in which a rank may end by itself, as at the end of a run or by the error of a broken connection."""
_FIRST = "LIT_LIPSCHITZ_FIRST_RANK"  # in the environment: the process of the first rank, which starts the others


def end_with_first_rank() -> None:
    """Leaves the first rank's process to those that it starts; another rank watches it in a thread of its own."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[_FIRST] = str(os.getpid())
    elif first := os.environ.get(_FIRST):
        threading.Thread(target=_watch, args=(int(first),), daemon=True).start()


def _watch(first: int) -> None:
    while _runs(first):
        time.sleep(1.0)
    time.sleep(GRACE)
    line = "lit-lipschitz: error: the first rank has died; start the run again, with --ckpt_path last if it has saved"
    print(line, file=sys.stderr, flush=True)
    os._exit(1)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True
