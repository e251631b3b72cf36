"""Keeps the state of the random number generators."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept_random_state(devices: Iterable[torch.device]) -> Iterator[None]:
    """Restores the generators of Python, of NumPy if it is imported, and of torch on the CPU and on some devices."""
    forked = [device for device in set(devices) if device.type != "cpu"]
    numpy, python_state = sys.modules.get("numpy"), random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    # "cuda" is torch's default; without devices to fork it has no effect, and earlier versions do not take None.
    with torch.random.fork_rng(forked, device_type=forked[0].type if forked else "cuda"):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
