"""Errors that a user can cause, each with a sentence that says what to do."""

from __future__ import annotations


class LearnedDiffusionError(Exception):
    """Base class: everything that the package raises on purpose."""


class InvalidImageError(LearnedDiffusionError):
    """The image can't be denoised: its type, shape or values don't fit."""


class InvalidSettingError(LearnedDiffusionError):
    """A setting is out of its range, or two settings contradict each other."""


class UnknownModelError(LearnedDiffusionError):
    """No diffusivity of that name is registered."""


class ModelFailedError(LearnedDiffusionError):
    """A model gave no number where it should say how much to diffuse."""


class DeviceError(LearnedDiffusionError):
    """The device isn't there, can't do what was asked, or has too little memory."""


class FileFormatError(LearnedDiffusionError):
    """A file can't be read or written in the format that its name or content says."""


class FileWriteError(LearnedDiffusionError):
    """A file couldn't be written; nothing that was there before has been touched."""


class MissingDependencyError(LearnedDiffusionError):
    """An optional library is needed; the message names the extra that brings it."""


class LearnedDiffusionWarning(UserWarning):
    """Category of the package's warnings: the result is as asked for, but less than it could be."""
