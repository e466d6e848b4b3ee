"""What the noise network says of an image: the level of the noise, place by place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files

import numpy as np
import torch
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import InvalidImageError
from napari_learned_diffusion.core.noise_network import CELL, N_LAGS, WINDOW, NoiseNetwork
from napari_learned_diffusion.core.weights import read_model

_BATCH = 16
"""Windows that are looked at together: more would take memory and no less time."""


@dataclass(frozen=True)
class NoiseEvidence:
    """The noise of some cells of a plane, each `CELL` pixels square.

    Parameters
    ----------
    row, column
        ``(n,)``, centre of each cell, in pixels.
    intensity
        ``(n,)``, mean of the cell, in layer units.
    noise_sigma
        ``(n,)``, standard deviation of the noise there, in layer units.
    uncertainty
        ``(n,)``, standard deviation of the logarithm of ``noise_sigma``, as the network says.
    autocorrelation
        ``(n, len(LAGS))``, of the noise.
    """

    row: NDArray[np.float64]
    column: NDArray[np.float64]
    intensity: NDArray[np.float64]
    noise_sigma: NDArray[np.float64]
    uncertainty: NDArray[np.float64]
    autocorrelation: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.row)


@cache
def bundled_noise_network() -> NoiseNetwork:
    """The noise network with the weights that come with the package, on the CPU.

    Raises
    ------
    FileFormatError
        if the installation is damaged.
    """
    weights = files("napari_learned_diffusion").joinpath("weights", "noise.safetensors")
    with as_file(weights) as path:
        return read_model(path, NoiseNetwork).eval()


def noise_evidence(
    plane: NDArray[np.floating],
    mask: NDArray[np.bool_] | None = None,
    *,
    network: NoiseNetwork | None = None,
) -> NoiseEvidence:
    """Look at every part of a plane.

    Parameters
    ----------
    plane
        ``(h, w)``, real numbers in layer units; of any size.
    mask
        ``(h, w)``, True where pixels count. ``None``: where they are finite.
    network
        ``None``: the one that comes with the package.

    Returns
    -------
    NoiseEvidence
        of the cells of which at least half counts.

    Raises
    ------
    InvalidImageError
        if it isn't a plane, or the mask has another shape.
    """
    values = np.asarray(plane, np.float64)
    if values.ndim != 2 or values.size == 0:
        raise InvalidImageError(f"Noise is looked at in planes (h, w), not in {values.shape}.")
    valid = np.isfinite(values)
    if mask is not None:
        if np.shape(mask) != values.shape:
            raise InvalidImageError(
                f"The mask's shape {np.shape(mask)} doesn't fit the plane's {values.shape}."
            )
        valid &= mask
    network = network or bundled_noise_network()
    found = values[valid]
    # On a range of about 1 nothing overflows in single precision.
    shift, scale = (
        (float(np.median(found)), float(np.ptp(found)) or 1.0) if found.size else (0.0, 1.0)
    )
    unit = np.where(valid, (values - shift) / scale, np.nan)
    tops, lefts = (_starts(n) for n in values.shape)
    places = [(top, left) for top in tops for left in lefts]
    windows = np.stack([_window(unit, *place) for place in places])
    levels, spreads, lags = [], [], []
    device = next(network.parameters()).device
    for start in range(0, len(windows), _BATCH):
        batch = torch.from_numpy(windows[start : start + _BATCH, None]).to(device, torch.float32)
        with torch.no_grad():
            level, log_variance, autocorrelation = (t.float().cpu().numpy() for t in network(batch))
        levels.append(level[:, 0])
        spreads.append(log_variance[:, 0])
        lags.append(autocorrelation)
    n = WINDOW // CELL
    cells = windows.reshape(-1, n, CELL, n, CELL)
    share = np.isfinite(cells).mean((2, 4))
    counts = share >= 0.5
    total = np.where(np.isfinite(cells), cells, 0).sum((2, 4))
    mean = total / np.maximum(share * CELL**2, 1)
    offsets = (np.arange(n) + 0.5) * CELL - 0.5
    corners = np.array(places, np.float64)
    rows = np.broadcast_to(corners[:, 0, None, None] + offsets[:, None], counts.shape)
    columns = np.broadcast_to(corners[:, 1, None, None] + offsets, counts.shape)
    return NoiseEvidence(
        row=rows[counts],
        column=columns[counts],
        intensity=mean[counts] * scale + shift,
        noise_sigma=np.exp(np.concatenate(levels)[counts].astype(np.float64)) * scale,
        uncertainty=np.exp(0.5 * np.concatenate(spreads)[counts].astype(np.float64)),
        autocorrelation=np.moveaxis(np.concatenate(lags), 1, -1)[counts].reshape(-1, N_LAGS),
    )


def _starts(n: int) -> list[int]:
    """Where windows begin along an axis of n pixels: as few as cover it, evenly spread."""
    count = max(1, -(-n // WINDOW))
    return [round(i * max(0, n - WINDOW) / max(1, count - 1)) for i in range(count)]


def _window(plane: NDArray[np.float64], top: int, left: int) -> NDArray[np.float64]:
    """A window, NaN beyond the plane."""
    part = plane[top : top + WINDOW, left : left + WINDOW]
    missing = [(0, WINDOW - n) for n in part.shape]
    return np.pad(part, missing, constant_values=np.nan)
