"""Which type a result has: decided here for arrays, files, batches and layers alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from napari_learned_diffusion.config import DiffusionConfig
from napari_learned_diffusion.core.errors import FileFormatError

if TYPE_CHECKING:
    from napari_learned_diffusion.files.formats import Format
    from napari_learned_diffusion.jobs.prepare import Prepared

FINE, COARSE = 1.5, 3.0
"""Noise levels in grey levels. After denoising about a fifth of the noise is left; rounding adds
0.29. Below the first that is more than what is left, and below the second it is as much."""

_LARGEST_WITH_FRACTIONS = 2.0**20
"""Up to here float32 has at least four bits behind the point."""


@dataclass(frozen=True)
class ResultType:
    """The type of a result.

    Parameters
    ----------
    dtype
        Of its pixels.
    message
        A sentence for the user where rounding to whole numbers matters, else empty.
    loses
        Whether rounding to whole numbers loses what averaging gains.
    """

    dtype: np.dtype[Any]
    message: str = ""
    loses: bool = False

    def as_solved(self, plane: NDArray[Any]) -> NDArray[Any]:
        """A plane of the input in the type that its result is to have, exactly.

        The solver rounds where the plane that it is given has whole numbers.
        """
        if self.dtype.kind != "f" or plane.dtype.kind == "f":
            return plane
        return plane.astype(np.float32 if plane.dtype.itemsize <= 2 else np.float64)


def for_format(
    config: DiffusionConfig, dtype: DTypeLike, file_format: Format | None
) -> DiffusionConfig:
    """The settings for a result that is written in a format, which may hold whole numbers only.

    Parameters
    ----------
    config
        What was asked for.
    dtype
        Of the image.
    file_format
        Of the result; ``None`` where it isn't known.

    Raises
    ------
    FileFormatError
        if float32 was asked for and the format can't hold it.
    """
    if file_format is None or file_format.holds_fractions or np.dtype(dtype).kind not in "iu":
        return config
    if config.dtype == "float32":
        raise FileFormatError(
            f"{file_format.key} files hold whole numbers only, not float32. Choose another format, "
            "or leave the type of the result out."
        )
    return config.with_(dtype="same")


def result_type(dtype: DTypeLike, prepared: Prepared | DiffusionConfig) -> ResultType:
    """The type of the result of an image of type ``dtype``.

    Parameters
    ----------
    dtype
        Of the image.
    prepared
        The settings, which say what is wanted, and the noise that decides where that is left open;
        settings that have not been prepared leave the type as it is.
    """
    same = np.dtype(dtype)
    wanted = (prepared if isinstance(prepared, DiffusionConfig) else prepared.requested).dtype
    if wanted == "float32":
        return ResultType(np.dtype(np.float32))
    if isinstance(prepared, DiffusionConfig):
        return ResultType(same)
    sigma = prepared.low_noise_sigma
    if same.kind not in "iu" or not sigma < COARSE:
        return ResultType(same)
    strength = f"The noise has a standard deviation of {sigma:.2g} grey levels"
    if sigma >= FINE:
        return ResultType(
            same,
            f"{strength}: rounding to whole numbers adds noise again. "
            "The result type float32 keeps the fractions.",
        )
    if wanted == "auto" and prepared.largest < _LARGEST_WITH_FRACTIONS:
        return ResultType(
            np.dtype(np.float32),
            f"{strength}: rounded to whole numbers the result would lose what averaging gains, "
            "so its type is float32.",
        )
    return ResultType(
        same,
        f"{strength}: rounding to whole numbers loses what averaging gains, and moves the mean. "
        "The result type float32 keeps the fractions.",
        loses=True,
    )
