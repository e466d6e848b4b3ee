"""Find out what a model has learned, and what it makes of the slice that it looks at."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_learned_diffusion.config import Function
from napari_learned_diffusion.core.diffusivity.base import Diffusivity
from napari_learned_diffusion.core.diffusivity.fields_of_experts import FieldsOfExperts
from napari_learned_diffusion.core.diffusivity.k_automation import KAutomation
from napari_learned_diffusion.core.diffusivity.layers import contrast_convolution
from napari_learned_diffusion.core.diffusivity.perona_malik import (
    FUNCTIONS,
    PeronaMalik,
    ellipticity,
)
from napari_learned_diffusion.core.operators import (
    Stencil,
    gradient,
    magnitude,
    mean_conductance,
    open_edges,
)
from napari_learned_diffusion.core.presmoothing import presmooth
from napari_learned_diffusion.jobs.learned import Curve, Experts, Learned, Scatter

SHOWN_EXPERTS = 8

SHOWN_ANSWERS = 10.0
"""Of an expert, in standard deviations of the noise: beyond it hardly any function changes."""

_CURVE_END = 8.0
"""Up to which gradient a curve is shown, in units of K."""

_POINTS = 201
_BINS = 60
_SEEN_PIXELS = 50_000
"""So many pixels tell which experts vary most, and how strong the gradients are."""

_STRONGEST = 0.998
"""Share of the gradients that a histogram shows."""


class Looker(ABC):
    """Collects what a model makes of a slice, step by step."""

    @abstractmethod
    def add(self, v: Tensor, g: Tensor, stencil: Stencil, valid: Tensor | None) -> None:
        """Look at a step.

        Parameters
        ----------
        v
            ``(1, 1, h, w)``, the stabilised image before it.
        g
            ``(1, edges, h, w)``, conductances.
        stencil
            Their edges.
        valid
            ``(1, 1, h, w)`` of 0 and 1; ``None``: all are valid.
        """

    @abstractmethod
    def learned(self) -> Learned:
        """What there is to show."""


def make_looker(model: Diffusivity) -> Looker:
    """The way of looking that suits a model."""
    if isinstance(model, PeronaMalik | KAutomation):
        return _CurveLooker(model)
    if isinstance(model, FieldsOfExperts):
        return _ExpertsLooker(model)
    return _ScatterLooker()


class _CurveLooker(Looker):
    def __init__(self, model: PeronaMalik | KAutomation) -> None:
        self._contrast = float(model.contrast)
        self._presmooth_sigma = float(model.presmooth_sigma)
        self._function: Function = model.function
        self._bins = np.linspace(0, _CURVE_END * self._contrast, _BINS + 1)
        self._gradient = np.linspace(0, self._bins[-1], _POINTS)
        self._x = torch.from_numpy((self._gradient / self._contrast) ** 2)
        self._b = ellipticity(self._x, self._function).numpy()
        self._turning_point = float(self._gradient[np.argmax(self._b < 0)])
        self._counts: list[NDArray[np.int64]] = []
        self._backward: list[float] = []

    def add(self, v: Tensor, g: Tensor, stencil: Stencil, valid: Tensor | None) -> None:
        seen = presmooth(v, self._presmooth_sigma, stencil.spacing, valid)
        is_open = open_edges(torch.ones_like(v) if valid is None else valid, stencil) > 0
        slopes = gradient(seen, stencil)[is_open].abs().double().cpu().numpy()
        self._counts.append(np.histogram(slopes, self._bins)[0])
        self._backward.append(float(np.mean(slopes > self._turning_point)) if slopes.size else 0.0)

    def learned(self) -> Curve:
        return Curve(
            contrast=self._contrast,
            function=self._function,
            gradient=self._gradient,
            diffusivity=FUNCTIONS[self._function](self._x).numpy(),
            ellipticity=self._b,
            turning_point=self._turning_point,
            bins=self._bins,
            counts=np.array(self._counts),
            backward=np.array(self._backward),
        )


class _ExpertsLooker(Looker):
    def __init__(self, model: FieldsOfExperts) -> None:
        self._model = model
        self._experts: Experts | None = None

    def add(self, v: Tensor, g: Tensor, stencil: Stencil, valid: Tensor | None) -> None:
        if self._experts is None:
            self._experts = look_at_experts(self._model, v, valid, SHOWN_ANSWERS)

    def learned(self) -> Experts:
        if self._experts is None:
            raise RuntimeError("No step was looked at.")
        return self._experts


class _ScatterLooker(Looker):
    def __init__(self) -> None:
        self._bins: NDArray[np.float64] | None = None
        self._diffusivity_bins: list[NDArray[np.float64]] = []
        self._counts: list[NDArray[np.int64]] = []

    def add(self, v: Tensor, g: Tensor, stencil: Stencil, valid: Tensor | None) -> None:
        neighbours = Stencil(spacing=stencil.spacing)
        slopes, diffusivity = (
            magnitude(gradient(v, neighbours), neighbours),
            mean_conductance(g, stencil),
        )
        if valid is not None:
            slopes, diffusivity = slopes[valid > 0], diffusivity[valid > 0]
        x, y = (values.flatten().double().cpu().numpy() for values in (slopes, diffusivity))
        if self._bins is None:
            self._bins = np.linspace(0, _strongest(x), _BINS + 1)
        bins = np.linspace(0, _strongest(y), _BINS * 2 // 3 + 1)
        self._diffusivity_bins.append(bins)
        self._counts.append(np.histogram2d(y, x, (bins, self._bins))[0].astype(np.int64))

    def learned(self) -> Scatter:
        bins = np.linspace(0, 1, 2) if self._bins is None else self._bins
        return Scatter(bins, np.array(self._diffusivity_bins), np.array(self._counts))


def look_at_experts(
    model: FieldsOfExperts, v: Tensor, valid: Tensor | None = None, reach: float = np.inf
) -> Experts:
    """The experts of a model whose functions vary most on a slice, each kernel once.

    Parameters
    ----------
    model
        The field of experts.
    v
        ``(1, 1, h, w)``, the stabilised slice.
    valid
        ``(1, 1, h, w)`` of 0 and 1; ``None``: all are valid.
    reach
        Up to which answer the functions are shown, in standard deviations of the noise; at most so
        far as there are answers.
    """
    with torch.no_grad():
        kernels = model.kernels.detach()
        found = contrast_convolution(v.to(kernels.dtype), kernels, valid)[0].flatten(1)
        if valid is not None:
            found = found[:, valid.flatten() > 0]
        every = -(-found.shape[1] // _SEEN_PIXELS)
        responses = found[:, ::every].double().cpu().numpy()
        largest = min(float(np.percentile(np.abs(responses), 99)), reach)
        answers = np.linspace(-1, 1, _POINTS) * (largest or 1.0)
        of_model = torch.from_numpy(answers).to(kernels.device, kernels.dtype)
        functions = model.functions(of_model).double().cpu().numpy()
    spread = [
        np.std(np.interp(response, answers, function))
        for response, function in zip(responses, functions, strict=True)
    ]
    centred = kernels[:, 0].double().cpu().numpy()
    centred = centred - centred.mean(axis=(1, 2), keepdims=True)
    shown = _distinct(centred, np.argsort(spread)[::-1])[:SHOWN_EXPERTS]
    return Experts(centred[shown], answers, functions[shown])


def _distinct(kernels: NDArray[np.float64], order: NDArray[np.intp]) -> list[int]:
    """The experts, in that order, whose kernel isn't, up to its sign, that of one before it."""
    unit = kernels.reshape(len(kernels), -1)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    shown: list[int] = []
    for expert in order:
        if all(abs(unit[expert] @ unit[other]) < 0.9 for other in shown):
            shown.append(int(expert))
    return shown


def _strongest(values: NDArray[np.float64]) -> float:
    """What nearly all values stay below, above 0."""
    some = values[:: -(-values.size // _SEEN_PIXELS) or 1]
    top = float(np.quantile(some, _STRONGEST)) if some.size else 0.0
    return top if top > 0 else 1.0
