"""Every error a user can cause or meet, as one small tree.

The message of each error is written for the person in front of the screen: what was wrong, with which value, and
what to do next. It never holds a path of the server, a token or a stack trace, so that it may be shown to a visitor
as it is.
"""

from __future__ import annotations


class SelfForcingError(Exception):
    """Root of the tree. Catch this to handle everything this project raises on purpose."""


class InvalidRequest(SelfForcingError, ValueError):
    """A request field is missing, of the wrong type or out of range. Raised before the model sees anything."""


class WeightsError(SelfForcingError):
    """A model folder or checkpoint is missing, damaged, of another kind or of another shape than its config says."""


class DownloadError(SelfForcingError):
    """A checkpoint could not be fetched or put in place: no network, no permission, no space. What came is kept."""


class OptionUnavailable(SelfForcingError):
    """An option cannot work on this machine or with this model (no compiler, no such decoder, ...)."""


class OutOfMemory(SelfForcingError):
    """The device ran out of memory during a run. The next run starts from a clean state."""


class NonFiniteOutput(SelfForcingError):
    """The model produced NaN or infinity. Names the block and the stage where it was first seen."""


class Cancelled(SelfForcingError):
    """The run was stopped by the user, or nobody is listening to it any more."""


class DeadlineExceeded(SelfForcingError):
    """The run took longer than its deadline."""


class VideoError(SelfForcingError):
    """Frames could not be encoded or written (no encoder, disk full, bad file)."""


class InvalidSettings(SelfForcingError, ValueError):
    """A setting of a training stage is unknown or impossible. Raised before anything starts."""


class TrainingDataError(SelfForcingError):
    """A prompt file, video or data set cannot be trained on. Names the file."""


class TrainingError(SelfForcingError):
    """A training run cannot go on: a process ended, the disk is full, the loss is no number. Says what is saved."""
