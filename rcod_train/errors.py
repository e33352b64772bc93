"""What can go wrong in a training.

RcodTrainError            exit code 9
├── ConfigError           2   an argument or a field of the configuration
├── DataError                 the photos
├── MetricError               a metric's parameters, or an image it can't judge
├── CheckpointError           a checkpoint that can't be read or belongs to another run
└── TrainError                the run can't go on
    ├── MissingPackage        a package of an extra is not installed
    └── Interrupted       130 stopped by a signal, with its state saved

rcod_train imports nothing of rcod_runtime, so the tree is its own; exit codes don't overlap.
"""

from __future__ import annotations


class RcodTrainError(Exception):
    """Base of all errors that a user, a file or a machine can cause here."""

    exit_code = 9


class ConfigError(RcodTrainError):
    """An argument or configuration field has a value that can't be used."""

    exit_code = 2


class DataError(RcodTrainError):
    """The training photos can't be used."""


class MetricError(RcodTrainError):
    """A metric's parameters can't be used, or it can't judge an image."""


class CheckpointError(RcodTrainError):
    """A checkpoint can't be read, is not whole, or belongs to another configuration."""


class TrainError(RcodTrainError):
    """The run can't go on: a loss is not finite, the disk is full, a worker died."""


class MissingPackage(TrainError):
    """A package is not installed; the message has the exact pip line."""


class Interrupted(TrainError):
    """The run was stopped by a signal after its state was saved."""

    exit_code = 130
