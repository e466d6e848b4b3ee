"""What the form says, as plain values, and the frozen request that is made from it. No Qt here."""

from __future__ import annotations

from dataclasses import dataclass, field

from napari_learned_diffusion.config import (
    DiffusionConfig,
    Device,
    Function,
    NoiseChoice,
    SchemeName,
    TilingConfig,
)
from napari_learned_diffusion.core.noise import Gaussian, NoiseModel, PoissonGaussian
from napari_learned_diffusion.widgets._layers import Source

CLASSICAL_MODEL = "perona-malik"
"""The one model whose diffusivity has parameters of its own to set; the others have learned them."""

_DEFAULT = DiffusionConfig()


@dataclass(frozen=True)
class Outputs:
    """Which layers a run shows.

    Parameters
    ----------
    denoised
        The result.
    residual
        What has been taken away: input minus result.
    diffusivity
        Diffusivity of the last iteration, 0 (an edge) to 1 (smoothed freely).
    """

    denoised: bool = True
    residual: bool = False
    diffusivity: bool = False

    @property
    def any(self) -> bool:
        """Whether there is anything to show."""
        return self.denoised or self.residual or self.diffusivity


@dataclass(frozen=True)
class FormValues:
    """What stands in the form's controls. ``None`` is *automatic*, an empty box.

    Parameters
    ----------
    noise_kind
        Which noise model is wanted.
    noise_sigma
        Level of Gaussian noise, in layer units.
    gain, offset
        Of Poisson-Gaussian noise, in layer units and their square.
    tile
        Edge length of a tile, in pixels.
    outputs
        The layers to show.

    The others are fields of `DiffusionConfig` of the same name.
    """

    model: str = _DEFAULT.model
    noise_kind: NoiseChoice = _DEFAULT.noise_kind
    noise_sigma: float | None = None
    gain: float | None = None
    offset: float | None = None
    iterations: int | None = _DEFAULT.iterations
    contrast: float | None = _DEFAULT.contrast
    function: Function = _DEFAULT.function
    scheme: SchemeName = _DEFAULT.scheme
    tau: float | None = _DEFAULT.tau
    stopping_time: float | None = _DEFAULT.stopping_time
    presmooth_sigma: float | None = _DEFAULT.presmooth_sigma
    device: Device = _DEFAULT.device
    tile: int | None = TilingConfig().tile
    outputs: Outputs = field(default_factory=Outputs)

    @property
    def is_classical(self) -> bool:
        """Whether the model has parameters of its own to set."""
        return self.model == CLASSICAL_MODEL

    def noise(self) -> NoiseModel | None:
        """The noise model that the form gives, ``None`` if it is to be estimated."""
        if self.noise_kind == "gaussian" and self.noise_sigma is not None:
            return Gaussian(self.noise_sigma)
        if self.noise_kind == "poisson-gaussian" and self.gain is not None:
            return PoissonGaussian(self.gain, self.offset or 0.0)
        return None

    def config(self) -> DiffusionConfig:
        """The settings. What doesn't apply to the model and the scheme keeps its default.

        Raises
        ------
        InvalidSettingError
            if a value is out of its range.
        """
        noise = self.noise()
        config = DiffusionConfig(
            model=self.model,
            iterations=self.iterations,
            noise=noise,
            noise_kind=self.noise_kind if noise is None else _DEFAULT.noise_kind,
            device=self.device,
        )
        if self.is_classical:
            config = config.with_(
                contrast=self.contrast,
                function=self.function,
                scheme=self.scheme,
                presmooth_sigma=self.presmooth_sigma,
            )
        if config.scheme == "fed":
            return config.with_(stopping_time=self.stopping_time)
        return config.with_(tau=self.tau)

    def tiling(self) -> TilingConfig:
        """How planes are cut.

        Raises
        ------
        InvalidSettingError
            if the tile is too small.
        """
        return TilingConfig(tile=self.tile)


@dataclass(frozen=True, eq=False)
class Request:
    """Everything that a job is told; nothing in it changes when the user goes on working.

    Parameters
    ----------
    source
        The layer.
    config, tiling, outputs
        The settings.
    known_noise
        The noise model that has been estimated before for this layer, so that a live preview
        doesn't estimate it anew for each slice; ``None`` if there is none.
    """

    source: Source
    config: DiffusionConfig
    tiling: TilingConfig
    outputs: Outputs
    known_noise: NoiseModel | None = None

    @property
    def effective_config(self) -> DiffusionConfig:
        """The settings, with the noise model filled in where it is known."""
        if self.config.noise is None and self.known_noise is not None:
            return self.config.with_(noise=self.known_noise)
        return self.config


def make_request(
    values: FormValues, source: Source, known_noise: NoiseModel | None = None
) -> Request:
    """Freeze form and layer into a request.

    Raises
    ------
    InvalidSettingError
        if a value is out of its range.
    """
    return Request(source, values.config(), values.tiling(), values.outputs, known_noise)
