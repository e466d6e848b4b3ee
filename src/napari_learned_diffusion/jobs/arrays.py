"""What callers give as an image: arrays of many libraries, lists, and what is none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from napari_learned_diffusion.core.errors import InvalidImageError


def as_image(image: Any) -> Any:
    """An image as an array that is indexed plane by plane.

    Parameters
    ----------
    image
        An array of numpy, dask, zarr, h5py, xarray or torch (on the CPU), or nested lists. Of a
        lazy array nothing is read.

    Raises
    ------
    InvalidImageError
        if it is no array, or one whose shape or place isn't known; the message says what to do.
    """
    if image is None:
        raise InvalidImageError("There is no image: it is None. Give an array.")
    if isinstance(image, str | bytes):
        raise InvalidImageError(
            "The image is text. Give an array; `napari_learned_diffusion.files.read` opens files."
        )
    if type(image).__module__.partition(".")[0] == "torch":
        image = _of_torch(image)
    if isinstance(image, np.ndarray) and not isinstance(image, np.ma.MaskedArray | np.memmap):
        image = np.asarray(image)  # subclasses, such as np.matrix, index in ways of their own
    lazy = all(hasattr(image, name) for name in ("shape", "dtype", "__getitem__"))
    array = image if lazy else _of_sequence(image)
    try:
        np.dtype(array.dtype)
    except TypeError as error:
        raise InvalidImageError(
            f"The image is a {type(image).__name__} with values of type {array.dtype}. "
            "Convert it to an array of numpy."
        ) from error
    if any(not isinstance(n, int | np.integer) or math.isnan(n) for n in array.shape):
        raise InvalidImageError(
            f"The shape of the image isn't known yet: {tuple(array.shape)}. "
            "Of a dask array, call compute_chunk_sizes() first."
        )
    return array


def _of_torch(tensor: Any) -> Any:
    """A tensor as an array of numpy that shares its memory."""
    place = getattr(tensor, "device", None)
    if place is None or place.type != "cpu":
        raise InvalidImageError(
            f"The image is a tensor on {place}. Move it to the CPU first: tensor.cpu()."
        )
    if tensor.layout is not _strided():
        raise InvalidImageError("The image is a sparse tensor. Make it dense: tensor.to_dense().")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    try:
        return tensor.numpy()
    except TypeError:  # such as bfloat16, which numpy lacks
        return tensor.float().numpy()


def _strided() -> Any:
    import torch  # whose tensor was given, so it is imported already

    return torch.strided


def _of_sequence(image: Any) -> Any:
    """Lists, buffers and what offers itself as an array."""
    try:
        array = np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidImageError(
            f"The image, a {type(image).__name__}, can't be made an array: {error}. "
            "Rows must be equally long and hold numbers."
        ) from error
    if array.dtype.kind == "O":
        raise InvalidImageError(
            f"The image, a {type(image).__name__}, holds other things than numbers. "
            "Give an array of numbers."
        )
    return array
