"""What the form says, as plain values, and the frozen request that is made from it. No Qt here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from napari_learned_diffusion.config import (
    DEFAULT_MODEL,
    Device,
    DiffusionConfig,
    Function,
    MapsConfig,
    NoiseChoice,
    NoiseScope,
    ResultType,
    SchemeName,
    TilingConfig,
)
from napari_learned_diffusion.core.noise import (
    Correlated,
    Gaussian,
    NoiseModel,
    PoissonGaussian,
    Rician,
)
from napari_learned_diffusion.core.user_models import model_stamp
from napari_learned_diffusion.core.zoo import card, noise_kind_of
from napari_learned_diffusion.files._napari import declared_missing
from napari_learned_diffusion.widgets._content import Probes
from napari_learned_diffusion.widgets._layers import Source

if TYPE_CHECKING:
    from napari_learned_diffusion.core.noise_estimation import NoiseEstimate
    from napari_learned_diffusion.jobs.denoise import Prepared

_DEFAULT = DiffusionConfig()

Found = TypeVar("Found")


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
        Diffusivity of one step, 0 (an edge) to 1 (smoothed freely).
    orientation
        Orientation of strongest diffusion in that step, in degrees from 0 to 180.
    """

    denoised: bool = True
    residual: bool = False
    diffusivity: bool = False
    orientation: bool = False

    @property
    def any(self) -> bool:
        """Whether there is anything to show."""
        return self.denoised or self.residual or self.has_maps

    @property
    def has_maps(self) -> bool:
        """Whether there is anything to show that belongs to one step."""
        return self.diffusivity or self.orientation


@dataclass(frozen=True)
class FormValues:
    """What stands in the form's controls. ``None`` is *automatic*, an empty box.

    Parameters
    ----------
    noise_kind
        Which noise model is wanted.
    noise_scope
        Whether the noise is estimated once for the stack or for each slice.
    noise_sigma
        Level of Gaussian, Rician or correlated noise, in layer units; 0 is no noise.
    correlation_length
        Of correlated noise, in pixels.
    gain, offset
        Of Poisson-Gaussian noise, in layer units and their square.
    tile
        Edge length of a tile, in pixels.
    memory_budget
        Bytes that the solver may use at once; in napari's preferences, not in the form.
    outputs
        The layers to show.
    map_step
        The step that diffusivity and orientation are of, counted from 1; ``None`` is the last.

    The others are fields of `DiffusionConfig` of the same name.
    """

    model: str = _DEFAULT.model
    noise_kind: NoiseChoice = _DEFAULT.noise_kind
    noise_scope: NoiseScope = _DEFAULT.noise_scope
    noise_sigma: float | None = None
    correlation_length: float | None = None
    gain: float | None = None
    offset: float | None = None
    iterations: int | None = _DEFAULT.iterations
    contrast: float | None = _DEFAULT.contrast
    function: Function = _DEFAULT.function
    scheme: SchemeName = _DEFAULT.scheme
    tau: float | None = _DEFAULT.tau
    stopping_time: float | None = _DEFAULT.stopping_time
    presmooth_sigma: float | None = _DEFAULT.presmooth_sigma
    dtype: ResultType = _DEFAULT.dtype
    device: Device = _DEFAULT.device
    tile: int | None = TilingConfig().tile
    memory_budget: int | None = TilingConfig().memory_budget
    outputs: Outputs = field(default_factory=Outputs)
    map_step: int | None = MapsConfig().step

    @property
    def model_settings(self) -> frozenset[str]:
        """The settings that the model has and others haven't."""
        return frozenset() if self.model == DEFAULT_MODEL else card(self.model).settings

    def noise(self) -> NoiseModel | None:
        """The noise model that the form gives, ``None`` if it is to be estimated."""
        if self.noise_kind == "poisson-gaussian" and self.gain is not None:
            return PoissonGaussian(self.gain, self.offset or 0.0)
        if self.noise_kind in ("auto", "poisson-gaussian") or self.noise_sigma is None:
            return None
        if self.noise_kind == "correlated":
            length = self.correlation_length
            return Correlated(self.noise_sigma, *([] if length is None else [length]))
        if self.noise_kind == "rician" and self.noise_sigma > 0:
            return Rician(self.noise_sigma)
        return Gaussian(self.noise_sigma)

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
            noise_scope=self.noise_scope if noise is None else _DEFAULT.noise_scope,
            dtype=self.dtype,
            device=self.device,
        )
        own = self.model_settings - {"stopping_time"}
        config = config.with_(**{name: getattr(self, name) for name in own})
        if config.scheme == "fed":
            return config.with_(stopping_time=self.stopping_time)
        return config.with_(tau=self.tau)

    def with_automatic_noise(self) -> FormValues:
        """The same values with the noise of the same kind to be estimated."""
        return replace(self, noise_sigma=None, correlation_length=None, gain=None, offset=None)

    def tiling(self) -> TilingConfig:
        """How planes are cut.

        Raises
        ------
        InvalidSettingError
            if the tile is too small.
        """
        return TilingConfig(self.tile, self.memory_budget)

    def maps(self) -> MapsConfig:
        """The maps of the diffusion that are asked for, and their step."""
        shown = self.outputs
        step = self.map_step if shown.has_maps else None
        return MapsConfig(shown.diffusivity, shown.orientation, step)


@dataclass(frozen=True, eq=False)
class Request:
    """Everything that a job is told; nothing in it changes when the user goes on working.

    Parameters
    ----------
    source
        The layer.
    config, tiling, outputs, maps
        The settings.
    known
        What has been found out before, so that a live preview doesn't estimate it anew.
    probes
        Tells a worker whether that still holds of an array that is loaded lazily.
    """

    source: Source
    config: DiffusionConfig
    tiling: TilingConfig
    outputs: Outputs
    maps: MapsConfig
    known: Known
    probes: Probes = field(default_factory=Probes)

    @property
    def effective_config(self) -> DiffusionConfig:
        """The settings, with the noise model filled in where it is known."""
        if self.config.noise is None and self.known.noise is not None:
            return self.config.with_(noise=self.known.noise)
        return self.config


@dataclass(frozen=True)
class Known:
    """What is known of a layer before a job starts.

    Parameters
    ----------
    prepared
        What these very settings have become for the layer as a whole, if that is known.
    noise
        The layer's noise model, if it was estimated and one model serves all slices.
    slice_by_slice
        Whether it was found that each slice needs a noise model of its own.
    """

    prepared: Prepared | None = None
    noise: NoiseModel | None = None
    slice_by_slice: bool = False


class Findings:
    """What jobs have found out about a layer's data, and for which settings it holds.

    It holds for the content that the layer had, see `_content`. Findings are of one layer and one
    set of settings, the last ones; looking back further would only save the estimates of users who
    switch to and fro.
    """

    def __init__(self) -> None:
        self.probes = Probes()
        self._prepared: tuple[Any, Prepared] | None = None
        self._used: tuple[Any, Prepared] | None = None
        self._noise: tuple[Any, Known] | None = None
        self._estimate: tuple[Any, NoiseEstimate] | None = None
        self._estimated_on: str = ""

    def add(self, request: Request, whole: Prepared | None, used: Prepared) -> None:
        """Note what a job has found out.

        Parameters
        ----------
        request
            What the job was asked.
        whole
            What the settings have become for the layer as a whole, if the job had to know.
        used
            What they have become for the slice or layer that was denoised.
        """
        if request.source.has_changed():
            return  # while the job was on: of which content that holds, nobody knows
        settings = _settings_key(request.source, request.config)
        noise = _noise_key(request.source, request.config)
        self._used = settings, used
        if whole is not None:
            self._prepared = settings, whole
            if whole.estimate is not None:
                one_for_all = None if whole.slice_by_slice else whole.estimate.model
                self._noise = (
                    noise,
                    Known(noise=one_for_all, slice_by_slice=whole.slice_by_slice),
                )
        estimate = used.estimate or (whole.estimate if whole is not None else None)
        if estimate is not None:
            self._estimate = noise, estimate
            self._estimated_on = _estimated_on(request, whole, used)

    def known(self, source: Source, config: DiffusionConfig) -> Known:
        """What a job with these settings need not find out again."""
        prepared = _look_up(self._prepared, _settings_key(source, config))
        if config.noise is not None:
            return Known(prepared=prepared)
        known = _look_up(self._noise, _noise_key(source, config)) or Known()
        return replace(known, prepared=prepared)

    def estimate(self, source: Source, config: DiffusionConfig) -> NoiseEstimate | None:
        """The noise that was last found in that layer, for people to see.

        To a noise model that the user gives, measurements for any kind of noise may be compared.
        """
        if self._estimate is None:
            return None
        (*layer, kind, scope), estimate = self._estimate
        is_of_layer = tuple(layer) == _layer_key(source)
        is_of_kind = (kind, scope) == (noise_kind_of(config), config.noise_scope)
        return estimate if is_of_layer and (is_of_kind or config.noise is not None) else None

    def scope(self, source: Source, config: DiffusionConfig) -> str:
        """Of what the noise is that `estimate` gives, for people to see.

        Empty where one noise model serves all slices.
        """
        if self.estimate(source, config) is None or config.noise is not None:
            return ""
        return self._estimated_on

    def used(self, source: Source, config: DiffusionConfig) -> DiffusionConfig | None:
        """What those settings have last become on that layer, for people to see."""
        prepared = _look_up(self._used, _settings_key(source, config))
        return None if prepared is None else prepared.config


def _estimated_on(request: Request, whole: Prepared | None, used: Prepared) -> str:
    """What an estimate is of, in words, where each slice gets a noise model of its own."""
    by_slice = request.known.slice_by_slice or (whole is not None and whole.slice_by_slice)
    source = request.source
    if not by_slice or source.n_slices == 1:
        return ""
    text = "Each slice gets a noise model of its own; this is that of "
    if used is whole or source.index is None:
        return f"{text}the whole stack."
    return f"{text}slice {', '.join(map(str, source.index))}."


def _look_up(entry: tuple[Any, Found] | None, key: Any) -> Found | None:
    return entry[1] if entry is not None and entry[0] == key else None


def _layer_key(source: Source) -> tuple[Any, ...]:
    return source.layer_id, source.content, source.plane_axes


def _noise_key(source: Source, config: DiffusionConfig) -> tuple[Any, ...]:
    return *_layer_key(source), noise_kind_of(config), config.noise_scope


def _settings_key(source: Source, config: DiffusionConfig) -> tuple[Any, ...]:
    return *_layer_key(source), config, model_stamp(config.model)


def config_for(values: FormValues, source: Source) -> DiffusionConfig:
    """The settings of a form for a layer, whose file may declare values that are no intensities.

    Raises
    ------
    InvalidSettingError
        if a value is out of its range.
    """
    return values.config().also_missing(declared_missing(source.metadata))


def make_request(values: FormValues, source: Source, findings: Findings) -> Request:
    """Freeze form and layer into a request.

    Raises
    ------
    InvalidSettingError
        if a value is out of its range.
    """
    config = config_for(values, source)
    known = findings.known(source, config)
    return Request(
        source,
        config,
        values.tiling(),
        values.outputs,
        values.maps(),
        known,
        findings.probes,
    )
