"""Shared by the tests: a small task and trainers, tables of optimizers and schedulers, data files, the command."""

from helpers.command import SCRIPT, error_line, last, same
from helpers.data import TEST_IMAGES, TRAIN_IMAGES, write_cifar, write_idx
from helpers.runs import Curves, Keep, Slices, ranks, two_ranks
from helpers.tables import OPTIMIZERS, SCHEDULER_STEPS, SCHEDULERS
from helpers.task import (
    CLASSES,
    EXAMPLES,
    ROOT,
    WIDTH,
    Classifier,
    Steps,
    adamws_scale,
    examples,
    explained,
    length,
    loader,
    mean_of_matrices,
    trainer,
)

__all__ = [
    "CLASSES",
    "EXAMPLES",
    "OPTIMIZERS",
    "ROOT",
    "SCHEDULERS",
    "SCHEDULER_STEPS",
    "SCRIPT",
    "TEST_IMAGES",
    "TRAIN_IMAGES",
    "WIDTH",
    "Classifier",
    "Curves",
    "Keep",
    "Slices",
    "Steps",
    "adamws_scale",
    "error_line",
    "examples",
    "explained",
    "last",
    "length",
    "loader",
    "mean_of_matrices",
    "ranks",
    "same",
    "trainer",
    "two_ranks",
    "write_cifar",
    "write_idx",
]
