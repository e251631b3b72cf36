"""Shared by the tests: a small task, trainers, tables of optimizers, schedulers and losses, data files, the command."""

from helpers.command import SCRIPT, error_line, last, same
from helpers.data import TEST_IMAGES, TRAIN_IMAGES, write_cifar, write_idx
from helpers.losses import LOSSES, ROWS, AnyLoss, LossCase, first_constant, one_hot
from helpers.runs import Curves, Keep, Slices, ranks, two_ranks
from helpers.tables import ADAPTIVE_DEFAULTS, ADAPTIVE_OPTIMIZERS, OPTIMIZERS, SCHEDULER_STEPS, SCHEDULERS
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
    "ADAPTIVE_DEFAULTS",
    "ADAPTIVE_OPTIMIZERS",
    "CLASSES",
    "EXAMPLES",
    "LOSSES",
    "OPTIMIZERS",
    "ROOT",
    "ROWS",
    "SCHEDULERS",
    "SCHEDULER_STEPS",
    "SCRIPT",
    "TEST_IMAGES",
    "TRAIN_IMAGES",
    "WIDTH",
    "AnyLoss",
    "Classifier",
    "Curves",
    "Keep",
    "LossCase",
    "Slices",
    "Steps",
    "adamws_scale",
    "error_line",
    "examples",
    "explained",
    "first_constant",
    "last",
    "length",
    "loader",
    "mean_of_matrices",
    "one_hot",
    "ranks",
    "same",
    "trainer",
    "two_ranks",
    "write_cifar",
    "write_idx",
]
