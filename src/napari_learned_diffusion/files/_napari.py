"""The reader and the writer that the manifest offers napari, which itself isn't imported."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._dicom import read_dicom_files
from napari_learned_diffusion.files._units import PIXEL
from napari_learned_diffusion.files._zarr import colour_of, window_of
from napari_learned_diffusion.files.formats import (
    FORMATS,
    format_of,
    read,
    supported_suffixes,
    write,
)
from napari_learned_diffusion.files.volume import Volume

if TYPE_CHECKING:
    from napari_learned_diffusion.files.formats import PathLike
    from napari_learned_diffusion.files.volume import Array

    LayerData: TypeAlias = tuple[Array, dict[str, Any], str]

_CHANNELS_TO_SPLIT = 7
"""Up to so many channels become layers of their own; more of them are a spectrum."""

_HEADERS = (
    *("mrc", "dicom", "nifti", "omero"),
    # What TIFF says about its images, and by what pixels mean the same again.
    *("ome", "imagej", "stacked", "photometric", "palette", "pixel_type"),
)
"""Metadata of a volume that its format writes back."""

_AXIS_WORDS = {"time": "T", "depth": "Z", "channel": "C", "channels": "C", "frame": "T"}


def get_reader(path: PathLike | Sequence[PathLike]) -> Callable[[Any], list[LayerData]] | None:
    """Offer napari a reader for the path, or for a list of paths to stack.

    Returns
    -------
    callable or None
        None if a name has a suffix that isn't ours, or a folder isn't an image.
    """
    paths = path if isinstance(path, Sequence) and not isinstance(path, str) else [path]
    return _read_layers if paths and all(_is_ours(Path(p)) for p in paths) else None


def _is_ours(path: Path) -> bool:
    try:
        return format_of(path) is not None
    except OSError:  # told when it is read
        return path.name.lower().endswith(supported_suffixes())


def _read_layers(path: PathLike | Sequence[PathLike]) -> list[LayerData]:
    if isinstance(path, Sequence) and not isinstance(path, str):
        volumes = [_stack(path)]
    else:
        volumes = _images(path)
    for note in (note for volume in volumes for note in volume.metadata.get("notes", ())):
        # napari shows warnings to the user.
        warnings.warn(note, stacklevel=2)
    return [_layer(volume) for volume in volumes]


def _images(path: PathLike) -> list[Volume]:
    """The images of a file in its order: one, or all those that don't fit together in a stack."""
    volume = read(path)
    others = volume.metadata.get("other_series", ())
    if not others:
        return [volume]
    first = volume.metadata["series"]
    # As all are shown, the note on which one was taken isn't true here.
    told = {key: value for key, value in volume.metadata.items() if key != "notes"}
    volumes = {first: replace(volume, metadata=told)}
    volumes |= {number: read(path, series=number) for number in others}
    return [volumes[number] for number in sorted(volumes)]


def _stack(paths: Sequence[PathLike]) -> Volume:
    """Several files of the same shape and type as one lazy volume with an axis before the others.

    Planes become slices (Z), anything larger frames (T).
    """
    import dask.array as da

    files = [Path(path) for path in paths]
    if len(files) > 1 and all(f.is_file() and format_of(f) is FORMATS["dicom"] for f in files):
        return read_dicom_files(files[0].parent, files, None, True)
    volumes = [read(path, lazy=True) for path in paths]
    first = volumes[0]
    if len(volumes) == 1:
        return first
    for path, volume in zip(paths, volumes, strict=True):
        if volume.metadata.get("other_series"):
            raise FileFormatError(
                f"{path} holds several images, which don't fit together: open it by itself."
            )
        if (volume.data.shape, volume.data.dtype, volume.axes) != (
            first.data.shape,
            first.data.dtype,
            first.axes,
        ):
            raise FileFormatError(
                f"{path} is {volume.axes} of shape {volume.data.shape} and type "
                f"{volume.data.dtype}, but {paths[0]} is {first.axes} of shape "
                f"{first.data.shape} and type {first.data.dtype}: open them one by one."
            )
    axis = next(letter for letter in "ZTQIUVW" if letter not in first.axes)
    return replace(
        first,
        data=da.stack([volume.data for volume in volumes]),  # type: ignore[no-untyped-call]
        axes=axis + first.axes,
        scale=(1.0, *first.scale),
        units=(PIXEL, *first.units),
        missing=tuple(sorted({value for volume in volumes for value in volume.missing})),
    )


def _layer(volume: Volume) -> LayerData:
    """A volume as napari's layer data tuple, its planes last: these are what napari shows."""
    volume = volume.transposed("".join(a for a in volume.axes if a not in "YX") + "YX")
    data, axes = volume.data, volume.axes
    placement = volume.metadata.get("placement", {})
    kwargs: dict[str, Any] = {}
    if "S" in axes and data.shape[axes.index("S")] in (3, 4) and data.dtype.kind in "uf":
        samples = axes.index("S")
        data = data.transpose([i for i in range(data.ndim) if i != samples] + [samples])
        kwargs["rgb"] = True
        axes = axes.replace("S", "")
    elif (
        "C" in axes
        and 1 < data.shape[axes.index("C")] <= _CHANNELS_TO_SPLIT
        and (placement.keys() <= {"translate"})
    ):
        kwargs["channel_axis"] = axes.index("C")
        axes = axes.replace("C", "")
    if "translate" in placement:
        places = dict(zip(volume.axes, placement["translate"], strict=True))
        placement = {**placement, "translate": [places[axis] for axis in axes]}
    steps = [volume.step(axis) for axis in axes]
    name: str | list[str] = volume.name
    if "channel_axis" in kwargs:
        count = data.shape[kwargs["channel_axis"]]
        names = volume.metadata.get("channel_names", [])
        if len(names) != count:
            names = [f"channel {i}" for i in range(count)]
        name = [f"{volume.name} {channel}" for channel in names]
        kwargs |= _channel_display(volume, count)
    elif "contrast_limits" in volume.metadata and "rgb" not in kwargs:
        kwargs["contrast_limits"] = volume.metadata["contrast_limits"]
    if "rgb" not in kwargs and volume.metadata.get("photometric") == "miniswhite":
        kwargs["colormap"] = "gray_r"
    return (
        data,
        {
            "name": name,
            "scale": tuple(step for step, _ in steps),
            "units": tuple(unit for _, unit in steps),
            "axis_labels": tuple(axis.lower() for axis in axes),
            "metadata": volume.metadata | ({"missing": volume.missing} if volume.missing else {}),
            **kwargs,
            **placement,
        },
        "image",
    )


def _channel_display(volume: Volume, count: int) -> dict[str, Any]:
    """How OME-Zarr's omero block wants the channels to be shown; each keeps its own part of it."""
    omero = volume.metadata.get("omero", {})
    channels = omero.get("channels", ())
    if len(channels) != count:
        return {}
    display: dict[str, Any] = {
        "colormap": [colour_of(channel) for channel in channels],
        "visible": [channel.get("active") is not False for channel in channels],
        "metadata": [
            volume.metadata | {"omero": omero | {"channels": [channel]}} for channel in channels
        ],
    }
    limits = [window_of(channel) for channel in channels]
    if all(limits):
        display["contrast_limits"] = limits
    return display


def write_image(path: str, data: Any, meta: dict[str, Any]) -> list[str]:
    """Write one image layer for napari, which has asked before a file is replaced.

    Parameters
    ----------
    path
        Where to.
    data
        The layer's pixels, or its levels if it is multiscale; the finest is written.
    meta
        The layer's attributes; scale, units, axis labels and where it lies are kept.

    Returns
    -------
    list of str
        The file written.

    Raises
    ------
    FileWriteError, FileFormatError
        as `write`.
    """
    return [str(write(path, volume_of_layer(path, data, meta), overwrite=True))]


def write_dicom_series(path: str, data: Any, meta: dict[str, Any]) -> list[str]:
    """Write one image layer as a folder of DICOM files for napari; as `write_image`."""
    volume = volume_of_layer(path, data, meta)
    return [str(write(path, volume, overwrite=True, format="dicom"))]


def volume_of_layer(path: str, data: Any, meta: Mapping[str, Any]) -> Volume:
    """The pixels of an image layer, not copied, with what its attributes say about its axes."""
    if meta.get("multiscale"):
        data = data[0]
    if hasattr(data, "finished"):
        data = data.finished()  # a result that is denoised as the user scrolls, or it refuses
    if not isinstance(data, np.ndarray) and not hasattr(data, "dask"):
        import dask.array as da

        data = da.from_array(data)  # type: ignore[no-untyped-call]
    colour = bool(meta.get("rgb"))
    ndim = data.ndim - colour
    axes = _axes_of_labels(meta.get("axis_labels") or (), ndim)
    scale = tuple(float(step) for step in meta.get("scale", (1.0,) * ndim))
    units = tuple(str(unit) for unit in meta.get("units") or (PIXEL,) * ndim)
    kept = {"placement": _placement(meta), "contrast_limits": meta.get("contrast_limits")}
    # Headers of the file that the layer, or what it was made from, was read from.
    kept |= {key: (meta.get("metadata") or {}).get(key) for key in _HEADERS}
    return Volume(
        data=data,
        axes=axes + "S" * colour,
        scale=scale + (1.0,) * colour,
        units=units + (PIXEL,) * colour,
        name=str(meta.get("name") or Path(path).stem),
        metadata={key: value for key, value in kept.items() if value},
        missing=declared_missing(meta.get("metadata") or {}),
    )


def _axes_of_labels(labels: Sequence[str], ndim: int) -> str:
    """Axis letters from a layer's labels, or by position where these don't tell."""
    letters = [_AXIS_WORDS.get(label.lower(), label.upper()) for label in labels]
    named = len(letters) == len(set(letters)) == ndim and {"Y", "X"} <= set(letters)
    if named and all(len(letter) == 1 and letter.isalpha() and letter != "S" for letter in letters):
        return "".join(letters)
    return "UVWIQTZYX"[-ndim:]


def _placement(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a layer's transforms beside its scale that do something, as plain lists."""
    ndim = len(meta.get("scale", ()))
    neutral = {
        "translate": np.zeros(ndim),
        "rotate": np.eye(ndim),
        "shear": np.zeros(ndim * (ndim - 1) // 2),
        "affine": np.eye(ndim + 1),
    }
    placement = {}
    for key, nothing in neutral.items():
        value = np.asarray(meta.get(key, nothing), dtype=float)
        if value.shape != nothing.shape or not np.array_equal(value, nothing):
            placement[key] = value.tolist()
    return placement


def declared_missing(metadata: Mapping[str, Any]) -> tuple[float, ...]:
    """The values that a layer's metadata declare to be no intensities, as a reader of ours wrote.

    Other programs may have put anything under that name; what isn't numbers says nothing.
    """
    values = metadata.get("missing")
    if not isinstance(values, list | tuple | np.ndarray):
        return ()
    return tuple(
        float(value)
        for value in values
        if isinstance(value, int | float | np.number) and not isinstance(value, bool)
    )
