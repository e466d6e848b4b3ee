"""What a diffusivity is: from a stabilised image to the conductances of its edges."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from napari_learned_diffusion.config import DiffusionConfig
from napari_learned_diffusion.core.operators import Offset, Stencil, mean_of_ends
from napari_learned_diffusion.core.trainable import Trainable


@dataclass(frozen=True)
class Suggestion:
    """Settings that suit the data where the user gives none; as in `config.DiffusionConfig`.

    Parameters
    ----------
    stopping_time
        In squared pixels.
    tau
        Time step of the explicit scheme, in squared pixels.
    contrast, presmooth_sigma
        Only for models that have them.
    """

    stopping_time: float
    tau: float
    contrast: float | None = None
    presmooth_sigma: float | None = None

    @property
    def iterations(self) -> int:
        """Explicit steps to the stopping time, at least 1."""
        return max(1, round(self.stopping_time / self.tau))


class Diffusivity(nn.Module, ABC):
    """Looks at an image and says how well each edge conducts.

    Subclasses need no care for stability: `core.limiter` scales their conductances down where a
    step would overshoot, so any values of at least 0 are right.
    """

    key: ClassVar[str]

    whole_steps_on_cpu: ClassVar[bool] = False
    """Whether there are kernels for whole steps on the CPU, in single precision, which make it the
    fastest device."""

    @abstractmethod
    def conductances(self, v: Tensor, stencil: Stencil, valid: Tensor | None, step: int) -> Tensor:
        """Conductances of all edges for one diffusion step.

        Parameters
        ----------
        v
            ``(b, 1, h, w)``, stabilised intensities: the noise has standard deviation 1. Finite;
            invalid pixels hold the mean of the valid ones.
        stencil
            The edges, with their lengths in pixels.
        valid
            ``(b, 1, h, w)`` of 0 and 1, or ``None`` where all pixels are valid.
        step
            Number of steps done so far.

        Returns
        -------
        ``(b, edges, h, w)``, at least 0, without unit.
        """

    @property
    @abstractmethod
    def reach(self) -> int:
        """How many pixels around an edge have a say in its conductance."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: DiffusionConfig) -> Self:
        """The diffusivity that a complete configuration (nothing left automatic) asks for."""

    @classmethod
    @abstractmethod
    def suggest(cls, v: NDArray[np.floating[Any]], model: str = "") -> Suggestion:
        """Good settings for stabilised planes, ``(n, h, w)``, NaN where a pixel isn't valid.

        Parameters
        ----------
        model
            Key of the trained parameters, for which there may be other settings; empty: those that
            come with the package.
        """

    @property
    @abstractmethod
    def working_maps(self) -> int:
        """How many maps of the slice's size a step holds at once, for the memory budget."""

    @property
    def alignment(self) -> int:
        """Tiles must begin at multiples of this, in pixels, to give what the whole gives."""
        return 1

    @property
    def most_iterations(self) -> int | None:
        """How many steps the diffusivity has conductances for; ``None`` where there is no end."""
        return None

    def halo(self, iterations: int) -> int:
        """How many pixels around a tile have a say in what so many steps make of it."""
        return iterations * (self.reach + 1)

    def offsets(self, step: int) -> tuple[Offset, ...]:
        """The edges that there are conductances for in a step, the first being 0."""
        return Stencil().offsets

    def begun(self) -> Self:
        """The diffusivity for one run: one that remembers earlier steps begins with no memory."""
        return self


class PixelDiffusivity(Diffusivity):
    """A diffusivity that is a map on pixels; an edge takes the mean of its two ends."""

    @abstractmethod
    def forward(self, v: Tensor, valid: Tensor | None, step: int) -> Tensor:
        """The map, ``(b, 1, h, w)``, at least 0; parameters as of `conductances`."""

    def conductances(self, v: Tensor, stencil: Stencil, valid: Tensor | None, step: int) -> Tensor:
        return mean_of_ends(self(v, valid, step), stencil)


class LearnedDiffusivity(Diffusivity, Trainable):
    """A diffusivity with trained parameters, from a weights file that a model card belongs to."""

    title: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    """What training writes into the model's card: a name, a sentence for users, the paper."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Fields of `config.DiffusionConfig` that this model has and others haven't."""
    last_layers: ClassVar[tuple[str, ...]] = ()
    """Parts of the names of the parameters that are near the answer, for a cautious fine-tuning."""

    def adapted(self, v: Tensor, stopping_time: float) -> Self:
        """The model with whatever it decides once for whole planes; in training only.

        Otherwise such decisions come from `suggest` and are part of the configuration.

        Parameters
        ----------
        v
            ``(b, 1, h, w)``, the stabilised planes before the first step.
        stopping_time
            That the run will reach, in squared pixels.
        """
        return self

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> Self:
        from napari_learned_diffusion.core.zoo import trained_model  # which knows this class

        return trained_model(cls, config.model)

    @classmethod
    def suggest(cls, v: NDArray[np.floating[Any]], model: str = "") -> Suggestion:
        """The iterations and the time step that the model was trained with, whatever the data."""
        from napari_learned_diffusion.core.zoo import card  # the cards import this package

        trained = card(model or cls.key).details["suggestion"]
        return Suggestion(trained["iterations"] * trained["tau"], trained["tau"])
