r"""Windows with known noise, which the noise network learns from.

A window is a crop of a photograph, of a volume, or a drawn texture, acquired in one of many ways
(`acquisitions`), then perhaps rounded, clipped and masked. Windows that are smooth or denoised may
have hardly any noise or none, so that texture isn't taken for noise; sharp ones have a little,
since photographs come with noise of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset

from napari_learned_diffusion.core.errors import InvalidImageError
from napari_learned_diffusion.core.learning.acquisitions import (
    LAGS,
    Acquisition,
    Camera,
    Interpolated,
    Kernel,
    Lines,
    Magnitude,
    Micrograph,
    Plane,
    ReconstructionKernel,
    Smoothed,
    Tomography,
    White,
    Window,
    smooth_field,
)
from napari_learned_diffusion.core.noise_network import CELL, WINDOW

_KINDS = {
    "white": 0.2,
    "camera": 0.16,
    "mri": 0.24,
    "ct": 0.15,
    "smoothed": 0.07,
    "kernel": 0.04,
    "interpolated": 0.06,
    "lines": 0.04,
    "micrograph": 0.04,
}
"""Which part of the windows is acquired how."""

_LEVELS = 0.7, 110.0
"""Noise levels on the 0-255 scale, uniform in the logarithm."""
_LOWEST = 0.02
"""Of windows without noise of their own."""
_NOISE_FREE = 0.05
_OWN_NOISE = 2.5
"""Noise levels of at least so many times a photograph's own are added to it as it is."""


@dataclass(frozen=True)
class Object:
    """A clean plane ``(h, w)`` on the 0-255 scale, and about how much noise of its own it has."""

    plane: NDArray[np.float32]
    own_noise: float


def read_objects(folders: Sequence[Path]) -> tuple[Object, ...]:
    """Photographs of some folders, and planes of the stacks (TIFF) among them.

    Raises
    ------
    InvalidImageError
        if there is none.
    """
    from skimage.io import imread

    from napari_learned_diffusion.core.learning.patches import read_images

    objects: list[Object] = []
    for folder in folders:
        stacks = sorted(p for p in folder.glob("*.tif*"))
        for path in stacks:
            stack = np.asarray(imread(path)).astype(np.float32)
            if stack.ndim != 3:
                continue
            scale = 255.0 / max(float(np.percentile(stack, 99.8)), 1e-6)
            for plane in stack[2:-2:4]:
                scaled = np.clip(plane * scale, 0, 400)
                objects.append(Object(scaled, _own_noise(scaled)))
        if not stacks:
            objects += [Object(image, 0.6) for image in read_images([folder], WINDOW).training]
    if not objects:
        raise InvalidImageError(f"There is no image in {', '.join(map(str, folders))}.")
    return tuple(objects)


def _own_noise(plane: NDArray[np.float32]) -> float:
    """From diagonal differences where the plane isn't empty."""
    diagonal = plane[1:, 1:] - plane[:-1, 1:] - plane[1:, :-1] + plane[:-1, :-1]
    inside = plane[1:, 1:] > 10
    return float(np.median(np.abs(diagonal[inside]))) / 1.349 if inside.any() else 0.0


class Windows(NamedTuple):
    """What a step of the noise network learns from.

    Parameters
    ----------
    noisy
        ``(batch, 1, WINDOW, WINDOW)``, NaN where pixels are missing.
    noise_sigma
        ``(batch, 1, n, n)``, root-mean-square of the noise of each cell; 0 where there is none.
    weight
        The same shape, 1 where the cell counts, else 0.
    autocorrelation
        ``(batch, len(LAGS))``.
    correlated
        ``(batch,)``, 1 where the autocorrelation counts, else 0.
    """

    noisy: Tensor
    noise_sigma: Tensor
    weight: Tensor
    autocorrelation: Tensor
    correlated: Tensor


class _Ready(NamedTuple):
    """Noise of a CT scan with mean level 1, and what its kernel does to an object."""

    noise: NDArray[np.float32]
    sigma: NDArray[np.float32]
    autocorrelation: NDArray[np.float64]
    blur: NDArray[np.float32]


class Simulator(Dataset[Windows]):
    """By the number of a step, its windows; they depend on the seed and that number alone.

    Parameters
    ----------
    objects
        What is acquired.
    batch
        Windows in a step.
    scans
        Windows of CT noise that are computed beforehand, each used in many steps.
    """

    def __init__(
        self, objects: Sequence[Object], batch: int, seed: int = 0, scans: int = 800
    ) -> None:
        self._objects, self._batch, self._seed = objects, batch, seed
        self._scans = _scans(objects, np.random.default_rng([seed, 2**20]), scans)

    def __getitem__(self, step: int) -> Windows:
        rng = np.random.default_rng([self._seed, step])
        return Windows(
            *map(torch.stack, zip(*(self._draw(rng) for _ in range(self._batch)), strict=True))
        )

    def _draw(self, rng: np.random.Generator) -> tuple[Tensor, ...]:
        clean, own_noise = self._content(rng)
        low, high = np.log(max(_LOWEST, own_noise * _OWN_NOISE)), np.log(_LEVELS[1])
        # Hardly any noise is drawn less often than some.
        level = float(np.exp(max(rng.uniform(low, high), rng.uniform(low, high))))
        none = own_noise == 0 and rng.random() < _NOISE_FREE
        kind = str(rng.choice(list(_KINDS), p=list(_KINDS.values())))
        if none:
            noisy, sigma, lags = clean, np.zeros_like(clean), np.zeros(len(LAGS))
        elif kind == "ct":
            clean, noisy, sigma, lags = self._scanned(clean, level, rng)
        else:
            acquired = _acquisition(kind, clean, level, rng).acquire(clean, rng)
            clean, noisy, sigma = acquired.clean, acquired.noisy, acquired.noise_sigma
            lags = acquired.autocorrelation
        # Where there is less signal than noise, the magnitude has another correlation.
        strong = kind != "mri" or float(np.mean(clean > 2 * sigma)) > 0.7
        noisy, sigma, valid, counts = _stored(noisy, sigma, rng)
        noisy = np.where(valid, noisy, np.nan)
        variance = _cells(np.where(valid, sigma**2, 0))
        share = _cells(valid.astype(np.float64))
        cells = np.sqrt(variance / np.maximum(share, 1e-6))
        weight = (share > 0.5) & (_cells(counts.astype(np.float64)) > 0.95 * share)
        known = bool(strong and not none and cells.max() > 0)
        return (
            torch.from_numpy(noisy[None].astype(np.float32)),
            torch.from_numpy(cells[None].astype(np.float32)),
            torch.from_numpy(weight[None].astype(np.float32)),
            torch.from_numpy(lags.astype(np.float32)),
            torch.tensor(float(known)),
        )

    def _content(self, rng: np.random.Generator) -> tuple[Plane, float]:
        """A window of something, and how much noise of its own it has."""
        kind = rng.random()
        if kind < 0.07:
            shading = smooth_field((WINDOW, WINDOW), rng.uniform(30, 90), rng)
            return rng.uniform(20, 200) + rng.uniform(0, 15) * shading, 0.0
        if kind < 0.19:
            return _texture(rng), 0.0
        if kind < 0.24:
            return _phantom(rng), 0.0
        drawn = self._objects[int(rng.integers(len(self._objects)))]
        plane, own_noise = drawn.plane, drawn.own_noise
        if rng.random() < 0.2 and min(plane.shape) >= 2 * WINDOW:
            h, w = (n // 2 * 2 for n in plane.shape)
            plane = plane[:h, :w].reshape(h // 2, 2, w // 2, 2).mean((1, 3))
            own_noise /= 2
        window = _crop(plane, rng)
        smoothing = rng.random() < 0.4
        if smoothing:
            window = ndimage.gaussian_filter(window, np.exp(rng.uniform(np.log(0.5), np.log(3.0))))
            own_noise = 0.0
        if rng.random() < 0.25:
            faint = np.exp(rng.uniform(-3, 0))
            window = window.mean() + faint * (window - window.mean())
            own_noise *= faint
        return window, own_noise

    def _scanned(
        self, clean: Plane, level: float, rng: np.random.Generator
    ) -> tuple[Plane, Plane, Plane, NDArray[np.float64]]:
        scan = self._scans[int(rng.integers(len(self._scans)))]
        noise, sigma, lags = scan.noise, scan.sigma, scan.autocorrelation
        if rng.integers(2):
            noise, sigma, lags = noise[::-1], sigma[::-1], _mirrored(lags)
        if rng.integers(2):
            noise, sigma, lags = noise[:, ::-1], sigma[:, ::-1], _mirrored(lags)
        if rng.integers(2):
            noise, sigma, lags = noise.T, sigma.T, _transposed(lags)
        clean = np.asarray(np.fft.ifft2(np.fft.fft2(clean) * scan.blur).real, np.float64)
        return clean, clean + level * noise, np.float64(level) * sigma, lags


def _crop(plane: NDArray[np.float32], rng: np.random.Generator) -> Plane:
    """A square window, turned and mirrored at random; what a small plane lacks is reflected."""
    missing = [(0, max(0, WINDOW - n)) for n in plane.shape]
    if any(after for _, after in missing):
        plane = np.pad(plane, missing, mode="symmetric")
    y, x = (int(rng.integers(n - WINDOW + 1)) for n in plane.shape)
    window = np.rot90(plane[y : y + WINDOW, x : x + WINDOW], int(rng.integers(4)))
    return np.asarray(window[:, ::-1] if rng.integers(2) else window, np.float64)


def _texture(rng: np.random.Generator) -> Plane:
    """Membranes, granules and vesicles, about as electron microscopes show them."""
    shape = (WINDOW, WINDOW)
    image = np.full(shape, rng.uniform(100, 180))
    for _ in range(int(rng.integers(1, 4))):
        length = rng.uniform(2.5, 14)
        field = ndimage.gaussian_filter(rng.normal(size=shape), length, mode="wrap")
        field /= field.std()
        slope = np.hypot(*np.gradient(field)) + 1e-3
        line = np.clip(1.5 - np.abs(field - rng.uniform(-1, 1)) / slope / rng.uniform(0.5, 2), 0, 1)
        image -= rng.uniform(20, 90) * line
        if rng.random() < 0.5:
            image += rng.uniform(-50, 50) * (field > rng.uniform(-1, 1.5))
    if rng.random() < 0.5:
        grains = rng.random(shape) < rng.uniform(0.002, 0.03)
        image -= rng.uniform(50, 400) * ndimage.gaussian_filter(grains * 1.0, rng.uniform(0.7, 2.5))
    return np.asarray(ndimage.gaussian_filter(image, rng.uniform(0.4, 1.5)))


def _phantom(rng: np.random.Generator) -> Plane:
    """Overlapping ellipses of constant intensity, with or without soft edges."""
    y, x = np.mgrid[:WINDOW, :WINDOW] / WINDOW
    image = np.full(y.shape, rng.uniform(0, 120))
    for _ in range(int(rng.integers(2, 14))):
        cy, cx, a, b, turn = *rng.uniform(0, 1, 2), *rng.uniform(0.03, 0.5, 2), rng.uniform(0, 3.2)
        u, v = (
            (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn),
            ((y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)),
        )
        image[(u / a) ** 2 + (v / b) ** 2 < 1] = rng.uniform(0, 255)
    return np.asarray(ndimage.gaussian_filter(image, rng.uniform(0, 1.5)))


def _acquisition(kind: str, clean: Plane, level: float, rng: np.random.Generator) -> Acquisition:
    """An acquisition of a kind, with about that noise level."""
    shape = clean.shape[0], clean.shape[1]
    if kind == "camera":
        return _camera(clean, level, rng)
    if kind == "mri":
        return _magnetic(clean, level, rng)
    field = level * _field(clean, rng)
    if kind == "smoothed":
        sy, sx = np.exp(rng.uniform(np.log(0.25), np.log(2.0), 2))
        return Smoothed(field, (sy, sy if rng.random() < 0.6 else sx))
    if kind == "kernel":
        return Kernel(field, rng.uniform(0.3, 2), rng.uniform(0.1, 2), rng.uniform(0.25, 0.75))
    if kind == "interpolated":
        y, x = rng.uniform(1.0, 2.3, 2)
        return Interpolated(field, (y, y if rng.random() < 0.6 else x), _angle(rng))
    if kind == "lines":
        return Lines(field, rng.uniform(0.03, 0.7), "rows" if rng.random() < 0.7 else "columns")
    if kind == "micrograph":
        return Micrograph(field, rng.uniform(0.05, 0.6), np.exp(rng.uniform(-3.5, -1.5)))
    assert shape == field.shape
    return White(field)


def _field(clean: Plane, rng: np.random.Generator) -> Plane:
    """A level that differs by place, by intensity, by both or not at all; 1 in the mean."""
    field = np.ones_like(clean)
    shape = clean.shape[0], clean.shape[1]
    if rng.random() < 0.4:
        field *= np.exp(rng.uniform(0, 0.7) * smooth_field(shape, rng.uniform(24, 96), rng))
    if rng.random() < 0.2:
        dark, mean = rng.uniform(0, 0.6), max(float(clean.mean()), 1.0)
        field *= np.sqrt(dark + (1 - dark) * np.clip(clean, 0, None) / mean + 1e-3)
    return field


def _camera(clean: Plane, level: float, rng: np.random.Generator) -> Camera:
    mean = max(float(clean.mean()), 1.0)
    read_part = rng.random() * (rng.random() < 0.7)
    multiplied = bool(rng.random() < 0.3)
    gain = level**2 * (1 - read_part) / mean / (1 + multiplied)
    step = gain / rng.choice([1, 2, 5]) if rng.random() < 0.3 else 0.0
    pedestal = rng.uniform(0, 0.3) * mean * (rng.random() < 0.3)
    return Camera(max(gain, 1e-4), level * read_part**0.5, pedestal, multiplied, step)


def _magnetic(clean: Plane, level: float, rng: np.random.Generator) -> Magnitude:
    along_y, along_x = rng.uniform(0.35, 1.0, 2) if rng.random() < 0.6 else (1.0, 1.0)
    shape = clean.shape[0], clean.shape[1]
    g_factor = None
    if rng.random() < 0.45:
        g_factor = np.exp(rng.uniform(0.1, 0.7) * smooth_field(shape, rng.uniform(24, 96), rng))
    return Magnitude(
        level,
        (along_y, along_y if rng.random() < 0.5 else along_x),
        elliptical=bool(rng.random() < 0.3),
        window=str(rng.choice(get_args(Window))) if rng.random() < 0.6 else "none",  # type: ignore[arg-type]
        strength=rng.uniform(0.2, 1),
        partial=rng.uniform(0.55, 1) if rng.random() < 0.3 else 1.0,
        g_factor=g_factor,
        real=bool(rng.random() < 0.25),
    )


def _angle(rng: np.random.Generator) -> float:
    return float(rng.uniform(0, 90)) if rng.random() < 0.4 else 0.0


def _stored(
    noisy: Plane, sigma: Plane, rng: np.random.Generator
) -> tuple[Plane, Plane, NDArray[np.bool_], NDArray[np.bool_]]:
    """As files hold it: rounded, clipped, shifted, in any unit, with parts that are missing.

    The last two are where there are pixels, and where these aren't clipped.
    """
    mean_level = float(np.sqrt(np.mean(sigma**2)))
    if rng.random() < 0.3 and mean_level > 0:
        step = mean_level / np.exp(rng.uniform(np.log(0.6), np.log(20)))
        noisy, sigma = np.rint(noisy / step) * step, np.sqrt(sigma**2 + step**2 / 12)
    valid = np.ones(noisy.shape, np.bool_)
    counts = valid
    if rng.random() < 0.08:
        low, high = np.percentile(noisy, [rng.uniform(0, 20), rng.uniform(80, 100)])
        counts = (noisy > low) & (noisy < high)
        noisy = np.clip(noisy, low, high)
    if rng.random() < 0.15:
        # Beyond the image's border, or a part of it that is masked.
        top, left = rng.integers(0, WINDOW // 2, 2) * rng.integers(0, 2, 2)
        valid = valid.copy()
        valid[: int(top)], valid[:, : int(left)] = False, False
        valid = np.rot90(valid, int(rng.integers(4)))
    scale = np.exp(rng.uniform(-2, 2))
    return noisy * scale + rng.normal() * 100 * scale, sigma * scale, valid, counts


def _cells(values: Plane) -> Plane:
    """Mean of each cell."""
    n = WINDOW // CELL
    return np.asarray(values.reshape(n, CELL, n, CELL).mean((1, 3)))


_PLACE = {lag: i for i, lag in enumerate(LAGS)}


def _mirrored(lags: NDArray[np.float64]) -> NDArray[np.float64]:
    """The autocorrelation of a mirrored image, along either axis."""
    return lags[[_PLACE[lag if lag[0] == 0 or lag[1] == 0 else (lag[0], -lag[1])] for lag in LAGS]]


def _transposed(lags: NDArray[np.float64]) -> NDArray[np.float64]:
    """The autocorrelation of a transposed image; a distance and its opposite have the same."""

    def place(lag: tuple[int, int]) -> int:
        y, x = lag[1], lag[0]
        return _PLACE[(y, x) if (y, x) in _PLACE else (-y, -x)]

    return lags[[place(lag) for lag in LAGS]]


def _scans(objects: Sequence[Object], rng: np.random.Generator, count: int) -> list[_Ready]:
    """Windows of CT noise, of scans with several windows each."""
    scans: list[_Ready] = []
    while len(scans) < count:
        scans += _scan(objects, rng, min(20, count - len(scans)))
    return scans


def _scan(objects: Sequence[Object], rng: np.random.Generator, windows: int) -> list[_Ready]:
    size = int(rng.integers(160, 320))
    drawn = objects[int(rng.integers(len(objects)))].plane.astype(np.float64)
    body = ndimage.zoom(drawn, [size / n for n in drawn.shape], order=1)
    y, x = np.mgrid[:size, :size] / size * 2 - 1
    body = (0.4 * 255 + 0.6 * body) * (
        (y / rng.uniform(0.6, 1)) ** 2 + (x / rng.uniform(0.6, 1)) ** 2 < 1
    )
    scanner = Tomography(
        photons=1.0,
        kernel=str(rng.choice(get_args(ReconstructionKernel))),  # type: ignore[arg-type]
        attenuation=1.0,
        air=0.0,
        element=float(np.exp(rng.uniform(np.log(0.6), np.log(2.0)))),
        angles=240,
    )
    paths = scanner.project(body)
    paths *= rng.uniform(1, 7) / paths.max()
    variance = np.exp(paths)
    ready = []
    for _ in range(windows):
        noise = scanner.reconstruct(
            rng.normal(size=paths.shape) * np.sqrt(variance),
            (size, size),
            *(rows := _stretch(size, rng), columns := _stretch(size, rng)),
        )
        sigma, lags = scanner.noise(variance, (size, size), rows, columns)
        mean = float(np.sqrt(np.mean(sigma**2)))
        blur = scanner.blur((WINDOW, WINDOW)).astype(np.float32)
        ready.append(
            _Ready((noise / mean).astype(np.float32), (sigma / mean).astype(np.float32), lags, blur)
        )
    return ready


def _stretch(size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Rows or columns of a window somewhere in a square image."""
    start = int(rng.integers(size - WINDOW + 1))
    return np.arange(start, start + WINDOW, dtype=np.float64)
