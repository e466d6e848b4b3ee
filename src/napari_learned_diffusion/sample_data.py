"""Simulated noisy stacks with clean references: CT, MRI, cryo-electron tomography, fluorescence.

Every stack is drawn by this module from a seed, in a few seconds and without a download: a phantom
with plausible anatomy, the physics of the instrument that blurs it, and then the noise. The
``open_*`` functions are what napari's *File > Open Sample* calls; the others give the same data to
scripts and tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from napari_learned_diffusion.core.noise import Gaussian, NoiseModel, PoissonGaussian

Volume = NDArray[np.float32]
LayerDataTuple = tuple[NDArray[Any], dict[str, Any], str]

N_SLICES = 16
SIZE = 256
"""Slices, and pixels a side of one, of every sample."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A noisy stack and what it would be without noise.

    Parameters
    ----------
    noisy
        ``(Z, Y, X)``, in the data type that the instrument would write.
    reference
        ``(Z, Y, X)`` in float32: the same acquisition without noise, in the same units.
    noise
        The noise model that describes the difference best, in layer units.
    scale
        Voxel size along Z, Y and X, in ``unit``.
    unit
        Name of the unit of length as pint spells it, e.g. ``"millimeter"``.
    name
        Name of the layer.
    contrast_limits
        Darkest and brightest displayed value, in layer units.
    description
        How the stack came about, in one or two sentences for people.
    intensity_unit
        Unit of the intensities; empty where they have none.
    """

    noisy: NDArray[Any]
    reference: Volume
    noise: NoiseModel
    scale: tuple[float, float, float]
    unit: str
    name: str
    contrast_limits: tuple[float, float]
    description: str
    intensity_unit: str = ""

    @property
    def units(self) -> tuple[str, str, str]:
        """The unit of each axis."""
        return (self.unit, self.unit, self.unit)

    @property
    def axis_labels(self) -> tuple[str, str, str]:
        """The name of each axis."""
        return ("z", "y", "x")

    def layer_data(self) -> LayerDataTuple:
        """The noisy stack as napari takes it; the reference and the noise are in its metadata."""
        keywords = {
            "name": self.name,
            "scale": self.scale,
            "units": self.units,
            "axis_labels": self.axis_labels,
            "contrast_limits": self.contrast_limits,
            "metadata": {
                "reference": self.reference,
                "noise": self.noise.to_dict(),
                "description": self.description,
                "intensity_unit": self.intensity_unit,
            },
        }
        return self.noisy, keywords, "image"


def open_low_dose_ct() -> list[LayerDataTuple]:
    """`low_dose_ct` as napari's layer data."""
    return [low_dose_ct().layer_data()]


def open_brain_mri() -> list[LayerDataTuple]:
    """`brain_mri` as napari's layer data."""
    return [brain_mri().layer_data()]


def open_cryo_em() -> list[LayerDataTuple]:
    """`cryo_em` as napari's layer data."""
    return [cryo_em().layer_data()]


def open_fluorescence() -> list[LayerDataTuple]:
    """`fluorescence` as napari's layer data."""
    return [fluorescence().layer_data()]


# ----------------------------------------------------------------------------------------------
# Computed tomography
# ----------------------------------------------------------------------------------------------

WATER_ATTENUATION = 0.0193
"""Attenuation of water at 70 keV, in 1/mm (NIST XCOM)."""

CT_PIXEL = 1.3  # mm
CT_SLICE_DISTANCE = 3.0  # mm
N_ANGLES = 300
N_DETECTORS = 366  # as many pixels as fit on a slice's diagonal, so that air has noise too
RAYS_PER_DETECTOR = 2


class _Ellipse(NamedTuple):
    """Centre and half axes in mm from the axis of rotation, y downwards; angle in rad."""

    x: float
    y: float
    a: float
    b: float
    angle: float = 0.0

    def contains(self, x: float, y: float) -> bool:
        c, s = math.cos(self.angle), math.sin(self.angle)
        u, v = c * (x - self.x) + s * (y - self.y), c * (y - self.y) - s * (x - self.x)
        return (u / self.a) ** 2 + (v / self.b) ** 2 < 1

    def shrunk(self, width: float) -> _Ellipse:
        return self._replace(a=self.a - width, b=self.b - width)


_Part = tuple[float, tuple[_Ellipse, ...]]
"""What the common part of some ellipses adds to the Hounsfield units below it."""


def low_dose_ct(seed: int = 0) -> Sample:
    r"""A chest with few photons: enhanced heart, lungs with vessels and nodules, dome of the liver.

    The line integrals of the phantom, made of ellipses, are exact. Each detector counts

    .. math:: N \sim \mathrm{Poisson}(I_0 e^{-p}) + \mathcal N(0, \sigma_e^2)

    photons of :math:`I_0` along a ray of line integral :math:`p`, and filtered back projection [1]_
    with a Hann window makes a slice of :math:`-\log(N/I_0)`. So the noise is what low-dose CT has:
    correlated, streaky, and strongest where the body is thickest.

    Parameters
    ----------
    seed
        Seed of the anatomy and of the noise.

    Returns
    -------
    Sample
        int16 Hounsfield units. Its noise model has the mean noise level inside the body.

    References
    ----------
    .. [1] A. C. Kak, M. Slaney, "Principles of Computerized Tomographic Imaging", IEEE Press
       (1988), chapter 3.

    Examples
    --------
    >>> sample = low_dose_ct()
    >>> sample.noisy.shape, sample.noisy.dtype
    ((16, 256, 256), dtype('int16'))
    """
    photons, electronic_noise = 8.0e3, 5.0  # per ray; standard deviation, in photons
    rng = np.random.default_rng(seed)
    vessels = _draw_lung_vessels(rng)
    clean = np.stack(
        [_sinogram(_chest(z, vessels)) for z in np.linspace(-1.0, 1.0, N_SLICES)]
    )  # (Z, angles, detectors)
    counts = rng.poisson(photons * np.exp(-clean)) + rng.normal(0, electronic_noise, clean.shape)
    # No detector reports less than a photon, or the logarithm would not exist.
    noisy = -np.log(np.maximum(counts, 1.0) / photons)

    slices = _back_project(np.concatenate([clean, noisy]))
    hounsfield = 1000 * (slices / WATER_ATTENUATION - 1)
    reference, image = hounsfield[:N_SLICES], hounsfield[N_SLICES:]
    in_body = reference > -300
    return Sample(
        noisy=np.rint(image).astype(np.int16),
        reference=reference,
        noise=Gaussian(float(np.std((image - reference)[in_body]))),
        scale=(CT_SLICE_DISTANCE, CT_PIXEL, CT_PIXEL),
        unit="millimeter",
        name="low-dose CT",
        contrast_limits=(-900.0, 500.0),
        description=(
            f"Simulated chest CT in Hounsfield units, {photons:.0f} photons a ray, "
            "filtered back projection."
        ),
        intensity_unit="HU",
    )


_LUNGS = (_Ellipse(-68, 4, 51, 66, 0.12), _Ellipse(68, 4, 51, 66, -0.12))


def _draw_lung_vessels(rng: np.random.Generator) -> NDArray[np.float64]:
    """Vessels as ``(n, 5)``: x, y at the middle slice and radius in mm, and dx/dz, dy/dz.

    They are thick near the hila and thin at the chest wall, and run outwards along z.
    """
    n = 560
    lung = rng.integers(2, size=n)
    centre = np.array([[e.x, e.y] for e in _LUNGS])[lung]
    extent = np.array([[e.a, e.b] for e in _LUNGS])[lung]
    hilum = centre + np.array([[32.0, 4.0], [-32.0, 4.0]])[lung]
    r, phi = np.sqrt(rng.uniform(0, 1, n)), rng.uniform(0, 2 * np.pi, n)
    position = centre + 0.93 * extent * np.stack([r * np.cos(phi), r * np.sin(phi)], axis=1)
    outwards = position - hilum
    distance = np.linalg.norm(outwards, axis=1)
    radius = np.clip(4.5 * np.exp(-distance / 38) * rng.uniform(0.5, 1.3, n), 0.7, 4.2)
    slope = outwards / distance[:, None] * rng.normal(0, 0.5, (n, 1)) + rng.normal(0, 0.2, (n, 2))
    return np.column_stack([position, radius, slope])


def _chest(z: float, vessels: NDArray[np.float64]) -> list[_Part]:
    """The slice at height z, from -1 (below the aortic arch) to 1 (the dome of the liver).

    Hounsfield units are relative to what a part lies on; the first one lies on air.
    """
    body = _Ellipse(0, 6, 158 + 4 * z, 112 + 3 * z)
    muscle = body.shrunk(13)
    lungs = tuple(e._replace(y=e.y + 2 * z, a=e.a - 3 * z, b=e.b - 3 * z) for e in _LUNGS)
    heart = _Ellipse(14 + 4 * z, -26 + 3 * z, 50 + 9 * z, 36 + 8 * z, 0.55)
    ventricle = _Ellipse(26 + 4 * z, -22 + 3 * z, 21 + 6 * z, 14 + 5 * z, 0.65)
    atrium = _Ellipse(-8 + 2 * z, -30 + 2 * z, 16 + 3 * z, 13 + 3 * z, 0.2)
    aorta = _Ellipse(24 - 2 * z, 42, 12.5, 12)
    oesophagus = _Ellipse(3, 36 + z, 7, 5, 0.3)
    vertebra = _Ellipse(0, 60, 19, 14)
    canal = _Ellipse(0, 84, 9, 6.5)

    parts: list[_Part] = [
        (900, (body,)),  # fat, at -100, on air, at -1000
        (150, (muscle,)),  # muscle, at 50
        *((-870, (lung,)) for lung in lungs),  # -820
        (0, (heart,)),  # as muscle; what it takes from the lungs follows below
        (110, (ventricle,)),
        (135, (atrium,)),
        (200, (aorta,)),
        (-30, (oesophagus,)),
        (-900, (oesophagus.shrunk(3.2),)),
        (520, (vertebra,)),  # cortical shell and spongy inside
        (-330, (vertebra.shrunk(2.2),)),
        (480, (_Ellipse(0, 84, 13.5, 10),)),
        (-510, (canal,)),
        (450, (_Ellipse(0, 102.5, 3.4, 8.5),)),
        *((420, (_Ellipse(s * 26, 84, 12, 4.2, s * 0.35),)) for s in (-1, 1)),
        (330, (_Ellipse(0, -88 + z, 17, 5),)),  # sternum
        (-160, (_Ellipse(0, -88 + z, 14.6, 3.0),)),
        (330, (_Ellipse(0, 126, 175, 3.5),)),  # the couch
    ]
    for organ in (heart, aorta, oesophagus, vertebra):
        parts += [(870, (organ, lung)) for lung in lungs]
    if z > 0.1:  # the right lung, on the viewer's left, makes room for the liver
        dome = 68 * np.sqrt(z - 0.1)
        liver = _Ellipse(-82, 4, 0.58 * dome, 0.95 * dome, 0.12)
        parts += [(870, (liver, lungs[0])), (60, (liver,))]
        if z > 0.5:  # metastases: the low contrast that noise hides first
            parts += [(-45, (_Ellipse(-90, 16, 8, 7),)), (-35, (_Ellipse(-70, -12, 5, 5.5),))]
    parts += _ribs(z, muscle)

    dz = z * CT_SLICE_DISTANCE * N_SLICES / 2  # mm
    discs: list[tuple[float, float, float]] = []  # x, y, radius
    for x, y, centre, radius in ((-88, -28, -10.8, 8.5), (84, 30, 4.8, 6.0), (64, 45, -2.4, 4.0)):
        squared = radius**2 - (dz - centre) ** 2
        if squared > 0:  # nodules are balls
            discs.append((x, y, math.sqrt(squared)))
    organs = [region[0] for _, region in parts if len(region) == 2]
    for x0, y0, radius, slope_x, slope_y in vessels.tolist():
        x, y = x0 + slope_x * dz, y0 + slope_y * dz
        if (
            any(lung.shrunk(radius + 1).contains(x, y) for lung in lungs)
            and not any(organ.shrunk(-radius).contains(x, y) for organ in organs)
            and not any(math.hypot(x - x1, y - y1) < radius + r1 for x1, y1, r1 in discs)
        ):
            discs.append((x, y, radius))
    return parts + [(850, (_Ellipse(x, y, radius, radius),)) for x, y, radius in discs]


def _ribs(z: float, muscle: _Ellipse) -> list[_Part]:
    """Cuts through ribs, which wander along the chest wall from slice to slice."""
    parts: list[_Part] = []
    for k in range(9):
        for side in (-1, 1):
            phi = -1.15 + 0.31 * k + 0.11 * z  # from the front to the back
            x = side * (muscle.a - 9) * np.cos(phi)
            y = muscle.y + (muscle.b - 8) * np.sin(phi)
            along = np.arctan2((muscle.b - 8) * np.cos(phi), -side * (muscle.a - 9) * np.sin(phi))
            length = 8.5 + 3.0 * np.sin(2.4 * k + 1.5 * z)
            rib = _Ellipse(x, y, length, 4.4, float(along))
            parts += [(650, (rib,)), (-420, (rib.shrunk(1.7),))]
    return parts


def _sinogram(parts: list[_Part]) -> NDArray[np.float64]:
    """Line integrals of the attenuation, ``(angles, detectors)``, without unit."""
    n_rays = N_DETECTORS * RAYS_PER_DETECTOR
    pitch = CT_PIXEL / RAYS_PER_DETECTOR
    theta = (np.arange(N_ANGLES) * np.pi / N_ANGLES)[:, None]
    t = ((np.arange(n_rays) - (n_rays - 1) / 2) * pitch)[None, :]
    total = np.zeros((N_ANGLES, n_rays))

    small: dict[int, list[tuple[float, _Ellipse]]] = {}
    for value, region in parts:
        size = max(region[0].a, region[0].b)
        if len(region) == 1 and size < 25:
            small.setdefault(2 if size < 2 else 5 if size < 5 else 25, []).append(
                (value, region[0])
            )
            continue
        begin, end = _chord(region[0], theta, t)
        for ellipse in region[1:]:
            begin_too, end_too = _chord(ellipse, theta, t)
            begin, end = np.maximum(begin, begin_too), np.minimum(end, end_too)
        total += value * np.maximum(end - begin, 0)

    # Most parts are small: of each only the few rays that can meet it are looked at.
    for size, group in small.items():
        window = np.arange(2 * int(size / pitch) + 3)
        ellipses = np.array([e for _, e in group]).T[..., None, None]  # (5, n, 1, 1)
        x, y = ellipses[:2]
        foot = x * np.cos(theta) + y * np.sin(theta)  # (n, angles, 1)
        ray = np.rint(foot / pitch + (n_rays - 1) / 2).astype(int) + window - window.size // 2
        begin, end = _chord(_Ellipse(*ellipses), theta, t[0, ray])
        weight = (end - begin) * np.array([value for value, _ in group])[:, None, None]
        cell = ray + n_rays * np.arange(N_ANGLES)[:, None]
        total += np.bincount(cell.ravel(), weight.ravel(), total.size).reshape(total.shape)

    total *= WATER_ATTENUATION / 1000
    return np.asarray(total.reshape(N_ANGLES, N_DETECTORS, RAYS_PER_DETECTOR).mean(axis=2))


def _chord(
    ellipse: _Ellipse, theta: NDArray[Any], t: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Where the rays ``x cos(theta) + y sin(theta) = t`` enter and leave an ellipse, in mm.

    Counted along the ray from its foot point; a ray that misses has begin = end.
    """
    x, y, a, b, angle = ellipse
    sin, cos = np.sin(theta - angle), np.cos(theta - angle)
    w2 = (a * cos) ** 2 + (b * sin) ** 2
    tau = t - (x * np.cos(theta) + y * np.sin(theta))
    middle = y * np.cos(theta) - x * np.sin(theta) - tau * (sin * cos * (a**2 - b**2) / w2)
    half = np.sqrt(np.maximum(w2 - tau**2, 0)) * (a * b / w2)
    return middle - half, middle + half


def _back_project(sinograms: NDArray[np.float64]) -> Volume:
    """Filtered back projection of ``(n, angles, detectors)`` to ``(n, Y, X)``, in 1/mm."""
    n = 768  # at least twice the detectors, so that the convolution doesn't wrap around
    upsampling = 4  # then the nearest sample is good enough
    k = np.rint(fft.fftfreq(n, 1 / n)).astype(int)
    ramp = np.zeros(n)  # Kak & Slaney's equation (61), which unlike |f| keeps the mean right
    odd = k % 2 == 1
    ramp[odd] = -1 / (np.pi * k[odd] * CT_PIXEL) ** 2
    ramp[0] = 1 / (4 * CT_PIXEL**2)
    frequency = fft.rfftfreq(n)
    response = fft.rfft(ramp).real * CT_PIXEL * np.cos(np.pi * frequency) ** 2
    spectrum = fft.rfft(sinograms.astype(np.float32), n, axis=2) * response.astype(np.float32)
    filtered = fft.irfft(spectrum, n * upsampling, axis=2) * upsampling
    rays = np.ascontiguousarray(np.moveaxis(filtered, 0, 2))  # (angles, rays, n)

    position = np.arange(SIZE) - (SIZE - 1) / 2
    total = np.zeros((SIZE * SIZE, sinograms.shape[0]), np.float32)
    for i in range(N_ANGLES):
        theta = i * np.pi / N_ANGLES
        t = position[None, :] * np.cos(theta) + position[:, None] * np.sin(theta)
        ray = np.rint((t + (N_DETECTORS - 1) / 2) * upsampling).astype(np.intp)
        total += rays[i].take(ray.ravel(), axis=0)
    total *= np.pi / N_ANGLES
    return np.ascontiguousarray(np.moveaxis(total.reshape(SIZE, SIZE, -1), 2, 0))


# ----------------------------------------------------------------------------------------------
# Magnetic resonance imaging
# ----------------------------------------------------------------------------------------------


def brain_mri(seed: int = 0) -> Sample:
    r"""A T1-weighted head: folded grey matter, white matter, ventricles, skull, lesions, bias.

    The noise of a magnitude image is Rician [1]_: a complex Gaussian one, taken the magnitude of,

    .. math:: u = \sqrt{(A + n_1)^2 + n_2^2}, \quad n_1, n_2 \sim \mathcal N(0, \sigma^2)

    Parameters
    ----------
    seed
        Seed of the anatomy and of the noise.

    Returns
    -------
    Sample
        uint16, arbitrary units. Its reference is :math:`A`, bias field included; its noise model is
        the Gaussian one with :math:`\sigma`, which the Rician one is where :math:`A > 3\sigma`.

    References
    ----------
    .. [1] H. Gudbjartsson, S. Patz, "The Rician distribution of noisy MRI data", Magn. Reson. Med.
       34 (1995), 910-914.

    Examples
    --------
    >>> sample = brain_mri()
    >>> sample.noise.describe()
    'Gaussian, standard deviation 60'
    """
    noise_sigma = 60.0
    pixel, slice_distance = 0.9, 4.0  # mm
    rng = np.random.default_rng(seed)
    reference = _head(rng, pixel, slice_distance) * _bias_field(rng)
    real = reference + rng.normal(0, noise_sigma, reference.shape)
    imaginary = rng.normal(0, noise_sigma, reference.shape)
    return Sample(
        noisy=np.rint(np.hypot(real, imaginary)).astype(np.uint16),
        reference=reference.astype(np.float32),
        noise=Gaussian(noise_sigma),
        scale=(slice_distance, pixel, pixel),
        unit="millimeter",
        name="brain MRI",
        contrast_limits=(0.0, 1100.0),
        description=(
            "Simulated T1-weighted MRI of a head with Rician noise, "
            f"sigma = {noise_sigma:.0f} in each channel."
        ),
    )


def _head(rng: np.random.Generator, pixel: float, slice_distance: float) -> Volume:
    """Signal of the tissues, ``(Z, Y, X)``, in arbitrary units; pixel and distance in mm."""
    signal = {"fat": 1000, "bone": 70, "csf": 190, "grey": 560, "white": 800, "muscle": 430}
    oversampling = 2  # edges of tissue are then as soft as those of real, finite voxels
    n = SIZE * oversampling
    step = pixel / oversampling
    axis = (np.arange(n) - (n - 1) / 2) * step
    y, x = axis[:, None], axis[None, :]
    x = x * (1 + 0.0004 * y)  # heads are wider at the back
    heights = (np.arange(N_SLICES) - 5.5) * slice_distance  # above the ventricles' middle

    # Where this field is zero, a sulcus runs inwards from the surface of the brain.
    spacing = np.array([slice_distance, step, step])
    folds = _smooth_field(rng, (N_SLICES, n, n), 3.5 / spacing)
    wobble = _smooth_field(rng, (N_SLICES, n, n), 14.0 / spacing)
    texture = _smooth_field(rng, (N_SLICES, n, n), 1.5 / spacing)

    slices = []
    for z, fold, wave, grain in zip(heights, folds, wobble, texture, strict=True):
        cap = np.sqrt(max(1 - (z / 78) ** 2, 0.1))  # the head narrows towards its top
        radius = np.hypot(x / 74, y / 93) / cap + 0.012 * wave
        depth = (1 - radius) * 74 * cap  # mm below the surface of the brain
        outwards = -depth + 0.4 * wave

        slope = np.hypot(*np.gradient(fold, step)) + 1e-3
        distance = np.abs(fold) / slope  # mm from the middle of the nearest sulcus
        sulcus = (distance < 0.9) & (depth < 23 + 4 * wave)
        fissure = (np.abs(x + 0.8 * wave) < 1.1) & ((np.abs(y) > 34) | (z > 24))
        brain = depth > 1.5
        fluid = ~brain | ((sulcus | fissure) & brain)
        to_fluid = ndimage.distance_transform_edt(~fluid) * step

        # _blend() turns a distance in mm into a fraction of the voxel.
        tissue = signal["grey"] + (signal["white"] - signal["grey"]) * _blend(to_fluid - 2.7)
        tissue *= 1 + 0.012 * grain
        for shape in _deep_grey(x, y, z):
            tissue += (signal["grey"] + 50 - tissue) * _blend(shape)
        for shape in _ventricles(x, y, z, wave):
            tissue += (signal["csf"] - tissue) * _blend(shape)
        for lx, ly, lz, lr, contrast in ((30, 20, 6, 5.5, -150), (-33, -22, 10, 4.0, -120)):
            inside = np.sqrt(max(lr**2 - (0.7 * (z - lz)) ** 2, 0)) - np.hypot(x - lx, y - ly)
            tissue += contrast * _blend(inside)
        value = np.where(fluid, signal["csf"], tissue)
        # From inside outwards: subarachnoid space, skull with marrow, scalp, air.
        value += (signal["bone"] - value) * _blend(outwards - 1.2)
        value += (330 - value) * _blend(1.1 - np.abs(outwards - 4.6))
        value += (signal["muscle"] - value) * _blend(outwards - 7.6)
        value += (signal["fat"] - value) * _blend(outwards - 8.6)
        value += (signal["muscle"] - value) * _blend(outwards - 12.2)
        value -= value * _blend(outwards - 13.6)
        slices.append(value.reshape(SIZE, oversampling, SIZE, oversampling).mean(axis=(1, 3)))
    return np.stack(slices).astype(np.float32)


def _ventricles(x: NDArray[Any], y: NDArray[Any], z: float, wave: NDArray[Any]) -> list[Any]:
    """Depth below the surface of each ventricle, in mm, on a slice at height z in mm."""
    size = np.sqrt(max(1 - ((z - 4) / 22) ** 2, 0))
    if size == 0:
        return []
    shapes = []
    for side in (-1, 1):
        for centre_y, tilt, length, width in ((-18, 0.34, 20, 5.2), (22, -0.5, 21, 5.6)):
            u = side * x - 10 - 0.30 * np.abs(centre_y) * 0.25
            v = y - centre_y
            across = np.cos(tilt) * u + np.sin(tilt) * v
            along = np.cos(tilt) * v - np.sin(tilt) * u
            radius = np.hypot(across / (width * size), along / (length * size))
            shapes.append((1 - radius) * width * size + 0.4 * wave)
    if z < 6:  # the third ventricle
        shapes.append((1 - np.hypot(x / 2.2, (y - 4) / 13)) * 2.2)
    return shapes


def _deep_grey(x: NDArray[Any], y: NDArray[Any], z: float) -> list[Any]:
    """Depth below the surface of thalamus, putamen and caudate nucleus, in mm."""
    size = np.sqrt(max(1 - ((z + 1) / 20) ** 2, 0))
    if size == 0:
        return []
    nuclei = ((11, 8, 8.5, 13, 0.25), (25, -6, 5, 15, -0.2), (14, -24, 5, 8, 0.2))
    shapes = []
    for side in (-1, 1):
        for cx, cy, a, b, tilt in nuclei:
            u, v = side * x - cx, y - cy
            across = np.cos(tilt) * u + np.sin(tilt) * v
            along = np.cos(tilt) * v - np.sin(tilt) * u
            shapes.append((1 - np.hypot(across / (a * size), along / (b * size))) * a * size)
    return shapes


def _bias_field(rng: np.random.Generator) -> Volume:
    """Sensitivity of the receive coil, ``(Z, Y, X)``: smooth, between about 0.75 and 1.25."""
    axes = np.meshgrid(
        np.linspace(-1, 1, N_SLICES),
        np.linspace(-1, 1, SIZE),
        np.linspace(-1, 1, SIZE),
        indexing="ij",
        sparse=True,
    )
    z, y, x = axes
    a, b, c, d = rng.uniform(0.06, 0.12, 4) * rng.choice([-1.0, 1.0], 4)
    return np.asarray(1 + a * x + b * y + c * (x**2 - y**2) + d * z * y, dtype=np.float32)


def _blend(depth: NDArray[Any]) -> NDArray[Any]:
    """Fraction of a voxel inside a shape, from the depth below its surface in mm."""
    return np.clip(depth / 0.9 + 0.5, 0, 1)


# ----------------------------------------------------------------------------------------------
# Cryo-electron tomography
# ----------------------------------------------------------------------------------------------


def cryo_em(seed: int = 0) -> Sample:
    r"""Slices of a tomogram of a frozen cell: vesicles, microtubules, actin and ribosomes in ice.

    Matter is dark. The contrast transfer function of the weak-phase approximation [1]_

    .. math:: -\sin\bigl(\pi\lambda\,\Delta f\,k^2 - \tfrac\pi2 C_s\lambda^3k^4 + \arcsin w\bigr)
              \, e^{-B k^2/4}

    at 300 kV, with :math:`\Delta f` = 2.5 µm underfocus and an amplitude contrast of w = 0.1, gives
    membranes their bright fringes. The noise is Gaussian with ten times the variance of the signal.

    Parameters
    ----------
    seed
        Seed of the cell and of the noise.

    Returns
    -------
    Sample
        float32, arbitrary units, ice at 0.

    References
    ----------
    .. [1] J. Frank, "Three-Dimensional Electron Microscopy of Macromolecular Assemblies", 2nd ed.,
       Oxford University Press (2006), chapter 2.

    Examples
    --------
    >>> sample = cryo_em()
    >>> sample.units
    ('nanometer', 'nanometer', 'nanometer')
    """
    pixel, slice_distance = 1.0, 4.0  # nm
    noise_to_signal = 10.0  # ratio of variances
    rng = np.random.default_rng(seed)
    density = _cell(rng, slice_distance)
    reference = _transfer_contrast(density, pixel)
    # As tomograms are delivered: scaled to a standard deviation of 1, signal and noise together.
    reference /= reference.std() * np.sqrt(1 + noise_to_signal)
    noise = Gaussian(float(np.sqrt(noise_to_signal / (1 + noise_to_signal))))
    return Sample(
        noisy=noise.add(reference, rng).astype(np.float32),
        reference=reference,
        noise=noise,
        scale=(slice_distance, pixel, pixel),
        unit="nanometer",
        name="cryo-electron tomogram",
        contrast_limits=(-3.5, 3.0),
        description=(
            "Simulated tomogram slices of a frozen-hydrated cell, 2.5 µm underfocus, "
            f"noise with {noise_to_signal:.0f} times the variance of the signal."
        ),
    )


def _cell(rng: np.random.Generator, slice_distance: float) -> Volume:
    """Density of what is in the ice, ``(Z, Y, X)``; coordinates in nm, one pixel a nm."""
    height = N_SLICES * slice_distance
    z = (np.arange(N_SLICES, dtype=np.float32) * slice_distance)[:, None, None]
    y = np.arange(SIZE, dtype=np.float32)[None, :, None]
    x = np.arange(SIZE, dtype=np.float32)[None, None, :]
    density = 0.12 * _smooth_field(rng, (N_SLICES, SIZE, SIZE), np.array([1.0, 3.0, 3.0]))

    # A cell membrane crosses the corner; vesicles of which one holds another.
    membranes = [(0.45 * height, 330.0, 330.0, 190.0)]
    membranes += [(0.5 * height, 70.0, 186.0, 44.0), (0.5 * height, 76.0, 192.0, 19.0)]
    membranes += [(0.3 * height, 148.0, 28.0, 22.0), (0.65 * height, 234.0, 40.0, 18.0)]
    wobble = 1.5 * _smooth_field(rng, (N_SLICES, SIZE, SIZE), np.array([6.0, 20.0, 20.0]))
    occupied = np.zeros((N_SLICES, SIZE, SIZE), bool)
    for cz, cy, cx, radius in membranes:
        r = np.sqrt((z - cz) ** 2 + (y - cy) ** 2 + (x - cx) ** 2) + wobble - radius
        # Two leaflets of head groups, 4 nm apart.
        density += 1.5 * (np.exp(-(((r - 2) / 1.1) ** 2)) + np.exp(-(((r + 2) / 1.1) ** 2)))
        occupied |= np.abs(r) < 8

    for cz, cy, cx, direction in ((34.0, 128.0, 90.0, 0.42), (22.0, 205.0, 60.0, 0.30)):
        lattice, near = _microtubule(z - cz, y - cy, x - cx, direction)
        inside = near & ~(np.sqrt((y - 330) ** 2 + (x - 330) ** 2) < 200)
        density += np.where(inside, lattice, 0)
        occupied |= near

    _add_actin(density, rng, z, y, x)
    _add_ribosomes(density, rng, occupied, slice_distance)
    return density.astype(np.float32)


def _microtubule(
    z: NDArray[Any], y: NDArray[Any], x: NDArray[Any], direction: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Density of a tube of 13 protofilaments around an axis in the plane, and where it is.

    Tubulin subunits are 4 nm apart; a helix of three starts rises 12 nm a turn.
    """
    along = np.cos(direction) * x + np.sin(direction) * y
    across = np.cos(direction) * y - np.sin(direction) * x
    r = np.hypot(across, z)
    phi = np.arctan2(z, across)
    wall = np.exp(-(((r - 10.6) / 2.0) ** 2))
    protofilaments = 1 + 0.5 * np.cos(13 * phi)
    subunits = 1 + 0.12 * np.cos(2 * np.pi * along / 4.0 + 3 * phi)
    return 1.4 * wall * protofilaments * subunits, np.broadcast_to(r < 15, wall.shape)


def _add_actin(
    density: Volume, rng: np.random.Generator, z: NDArray[Any], y: NDArray[Any], x: NDArray[Any]
) -> None:
    """Draw a bundle of bent filaments, 7 nm thick, in the upper left, in place."""
    for k in range(5):
        offset = 16 + 13.0 * k + rng.normal(0, 2)
        centre_y = offset + 0.08 * x + 4 * np.sin(x / 55 + rng.uniform(0, 6))
        centre_z = rng.uniform(12, 52) + 0.04 * x
        twist = 1.2 * np.sin(2 * np.pi * x / 37 + rng.uniform(0, 6))  # the two strands cross
        r2 = (y - centre_y - twist) ** 2 + (z - centre_z) ** 2
        beads = 1 + 0.2 * np.cos(2 * np.pi * x / 5.5)
        ends = np.clip((118 - x) / 6, 0, 1)
        density += 1.5 * np.exp(-r2 / 2.6**2) * beads * ends


def _add_ribosomes(
    density: Volume, rng: np.random.Generator, occupied: NDArray[np.bool_], slice_distance: float
) -> None:
    """Put clumps of 24 nm, of two unequal subunits, where nothing else is, in place."""
    reach = 18
    window = np.arange(-reach, reach + 1, dtype=np.float32)
    n_z = int(np.ceil(reach / slice_distance))
    for _ in range(1500):
        cz = int(rng.integers(N_SLICES))
        cy, cx = (int(v) for v in rng.integers(reach, SIZE - reach, 2))
        low, high = max(cz - n_z, 0), min(cz + n_z + 1, N_SLICES)
        box = np.s_[low:high, cy - reach : cy + reach + 1, cx - reach : cx + reach + 1]
        if occupied[box].mean() > 0.08:
            continue
        dz = ((np.arange(low, high) - cz) * slice_distance)[:, None, None]
        axis = rng.normal(size=3)
        axis /= np.linalg.norm(axis)
        clump = np.zeros(density[box].shape, np.float32)
        for place, spread, count in ((-3.5, 4.0, 16), (5.0, 2.6, 9)):
            for bz, by, bx in place * axis + rng.normal(0, spread, (count, 3)):
                squared = (dz - bz) ** 2 + ((window - by) ** 2)[:, None] + (window - bx) ** 2
                clump += np.exp(-squared / 3.4**2)
        density[box] += 1.4 * clump
        occupied[box] = True


def _transfer_contrast(density: Volume, pixel: float) -> Volume:
    """What the microscope makes of each slice; ``pixel`` in nm."""
    wavelength, underfocus, aberration = 0.00197, 2500.0, 2.7e6  # nm, at 300 kV
    amplitude_contrast, decay = 0.1, 12.0  # none, and nm²
    padding = 32  # so that fringes don't come in again on the other side
    padded = np.pad(density, ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
    ky = fft.fftfreq(padded.shape[1], pixel)[:, None]
    kx = fft.rfftfreq(padded.shape[2], pixel)[None, :]
    k2 = ky**2 + kx**2
    phase = np.pi * wavelength * underfocus * k2 - np.pi / 2 * aberration * wavelength**3 * k2**2
    transfer = -np.sin(phase + np.arcsin(amplitude_contrast)) * np.exp(-decay * k2 / 4)
    spectrum = fft.rfft2(padded) * transfer
    image = fft.irfft2(spectrum, padded.shape[1:])[:, padding:-padding, padding:-padding]
    return np.asarray(image - np.median(image), dtype=np.float32)


# ----------------------------------------------------------------------------------------------
# Fluorescence microscopy
# ----------------------------------------------------------------------------------------------


def fluorescence(seed: int = 0) -> Sample:
    r"""A confocal stack with few photons: filaments, a nucleus that they spare, and vesicles.

    The camera counts :math:`u = g\,\mathrm{Poisson}(n) + m + \mathcal N(0, s^2)` for n photons,
    with gain g, pedestal m and read-out noise s [1]_.

    Parameters
    ----------
    seed
        Seed of the cell and of the noise.

    Returns
    -------
    Sample
        uint16 counts; its reference includes the pedestal.

    References
    ----------
    .. [1] A. Foi, M. Trimeche, V. Katkovnik, K. Egiazarian, "Practical Poissonian-Gaussian noise
       modeling and fitting for single-image raw-data", IEEE Trans. Image Process. 17 (2008),
       1737-1754.

    Examples
    --------
    >>> sample = fluorescence()
    >>> sample.noise.key
    'poisson-gaussian'
    """
    gain, pedestal, read_noise = 4.0, 100.0, 5.0  # counts per photon, counts, counts
    rng = np.random.default_rng(seed)
    photons = _stained_cell(rng)
    counts = gain * rng.poisson(photons) + pedestal + rng.normal(0, read_noise, photons.shape)
    return Sample(
        noisy=np.rint(np.maximum(counts, 0)).astype(np.uint16),
        reference=(gain * photons + pedestal).astype(np.float32),
        noise=PoissonGaussian(gain, read_noise**2 - gain * pedestal),
        scale=(0.3, 0.11, 0.11),
        unit="micrometer",
        name="fluorescence",
        contrast_limits=(90.0, 230.0),
        description=(
            "Simulated confocal stack of a cell, "
            f"{photons.max():.0f} photons at its brightest pixel."
        ),
        intensity_unit="counts",
    )


def _stained_cell(rng: np.random.Generator) -> Volume:
    """Expected photons, ``(Z, Y, X)``."""
    shape = (N_SLICES, SIZE, SIZE)
    centre = np.array([7.0, 118.0, 132.0])
    emitters = np.zeros(shape, np.float32)
    n_filaments, n_steps = 170, 420
    # All filaments grow at once from around the nucleus, each in a direction that slowly turns.
    heading = rng.uniform(0, 2 * np.pi, n_filaments)
    turn = rng.normal(0, 0.004, n_filaments)
    begin = 34 + 8 * rng.random(n_filaments)
    y, x = centre[1] + begin * np.sin(heading), centre[2] + begin * np.cos(heading)
    z = centre[0] + rng.normal(0, 3.4, n_filaments)
    climb = rng.normal(0, 0.006, n_filaments)
    length = rng.uniform(0.35, 1.0, n_filaments) * n_steps
    for step in range(n_steps):
        turn = 0.97 * turn + rng.normal(0, 0.0022, n_filaments)
        heading = heading + turn
        y, x, z = y + 0.5 * np.sin(heading), x + 0.5 * np.cos(heading), z + climb
        outside = np.hypot((y - centre[1]) / 38, (x - centre[2]) / 31) > 1
        alive = (step < length) & outside
        _splat(emitters, z[alive], y[alive], x[alive], 1.0)

    n_vesicles = 90
    r, phi = rng.uniform(40, 95, n_vesicles), rng.uniform(0, 2 * np.pi, n_vesicles)
    place = centre[:, None] + [rng.normal(0, 2.5, n_vesicles), r * np.sin(phi), r * np.cos(phi)]
    for brightness in (12.0, 12.0, 18.0):  # three unequal spots each make them irregular
        spot = place + rng.normal(0, 0.7, place.shape)
        _splat(emitters, spot[0], spot[1], spot[2], brightness)

    # A confocal point-spread function, 0.24 µm wide and 0.8 µm deep, and what is out of focus.
    sharp = ndimage.gaussian_filter(emitters, (1.15, 0.95, 0.95), mode="constant")
    haze = ndimage.gaussian_filter(emitters, (3.0, 9.0, 9.0), mode="constant")
    photons = 21 * sharp + 9 * haze + 0.6
    return np.asarray(photons, dtype=np.float32)


def _splat(
    volume: Volume, z: NDArray[Any], y: NDArray[Any], x: NDArray[Any], brightness: float
) -> None:
    """Add points to a volume in place, each shared between its eight nearest voxels."""
    low = np.floor([z, y, x]).astype(int)
    part = np.array([z, y, x]) - low
    for corner in np.ndindex(2, 2, 2):
        side = np.array(corner)[:, None]
        weight = np.prod(np.where(side == 1, part, 1 - part), axis=0)
        index = low + side
        valid = np.all((index >= 0) & (index < np.array(volume.shape)[:, None]), axis=0)
        np.add.at(volume, tuple(index[:, valid]), brightness * weight[valid])


def _smooth_field(
    rng: np.random.Generator, shape: tuple[int, ...], sigma: NDArray[np.float64]
) -> Volume:
    """White noise smoothed by a Gaussian of ``sigma`` voxels an axis, to standard deviation 1."""
    white = rng.standard_normal(shape, dtype=np.float32)
    smooth = ndimage.gaussian_filter(white, tuple(sigma), mode="wrap", truncate=3.0)
    return np.asarray(smooth / smooth.std(), dtype=np.float32)
