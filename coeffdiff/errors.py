"""Every error that a person can meet; what is raised where the value is used, and said once by the command line.

    CoeffDiffError                  exit code 2
    |-- ConfigError                 a setting: unknown key, impossible value, unreadable file
    |-- ShapeError                  tensors that do not fit together
    |-- PhotoError                  the photo folder: missing, empty, nothing usable
    |-- ModelError                  a base model that cannot be had, or is of a family that is not known
    |   `-- NonFinitePicture        a picture that came out as NaN
    |-- HubError                    a push: no login, no right, a name in use, no network
    |-- InjectionError              attention layers that cannot take alpha, or have lost it
    |-- AdapterError                an adapter: missing, damaged, foreign
    |   `-- AdapterMismatch         a sound adapter for another base model
    |-- OutOfMemory                 the GPU's memory or the machine's is too small for this
    |-- TaskError                   a task among many that did not come to its end
    |   |-- TaskDefect              a defect of this program in a task; its traceback is in the task's log
    |   `-- WorkerLost              its worker ended with it, as often as it was tried
    |-- LaunchError                 a parallel launch that would not be parallel, or is not supported
    |-- TrainingError               a run that cannot go on
    |   |-- NonFiniteLoss           the loss became NaN or infinite
    |   `-- ResumeError             nothing to resume, or other settings than before
    `-- Interrupted                 Ctrl-C; exit code 130

A message says what was found, what was expected and what to do, in one or two sentences.
"""

from __future__ import annotations


class CoeffDiffError(Exception):
    """Base of all; its message is written for the person at the command line."""

    exit_code = 2


class ConfigError(CoeffDiffError):
    pass


class ShapeError(CoeffDiffError, ValueError):
    pass


class PhotoError(CoeffDiffError):
    pass


class ModelError(CoeffDiffError):
    pass


class HubError(CoeffDiffError):
    pass


class InjectionError(CoeffDiffError):
    pass


class AdapterError(CoeffDiffError):
    pass


class AdapterMismatch(AdapterError):  # noqa: N818  (reads as a sentence: "AdapterMismatch: ...")
    pass


class OutOfMemory(CoeffDiffError):  # noqa: N818
    pass


class NonFinitePicture(ModelError):  # noqa: N818
    pass


class TaskError(CoeffDiffError):
    exit_code = 1


class TaskDefect(TaskError):  # noqa: N818
    pass


class WorkerLost(TaskError):  # noqa: N818
    pass


class LaunchError(CoeffDiffError):
    pass


class TrainingError(CoeffDiffError):
    pass


class NonFiniteLoss(TrainingError):  # noqa: N818
    pass


class ResumeError(TrainingError):
    pass


class KernelsUnused(RuntimeWarning):
    """The fused attention kernels cannot be imported or were found to be wrong, and slower chunks do their work."""


class BaseWeightsChanged(RuntimeWarning):
    """The base model is not bit for bit what it was before an adapter: its LoRA was fused and taken out again."""


class AlphaFrozen(RuntimeWarning):
    """Alpha that was attached for training is in a model that trains, and something has frozen it."""


class CachedAdapter(RuntimeWarning):
    """The Hub cannot be reached, and an adapter is the cached copy, which may be older than the Hub's."""


class Interrupted(CoeffDiffError):  # noqa: N818
    exit_code = 130
