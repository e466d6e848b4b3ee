"""Reading OME-Zarr, chunked images of several resolutions, and plain zarr arrays."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._extras import readable, refusing
from napari_learned_diffusion.files._lazy import OnDisk, is_lazy, stamp_of
from napari_learned_diffusion.files._units import PIXEL, parse_step, parse_unit
from napari_learned_diffusion.files._zarr_chunks import check_chunks, check_headers
from napari_learned_diffusion.files.volume import Volume, bare_name

ZARR_SUFFIXES = (".ome.zarr", ".zarr")

ZIPPED_ZARR = (".zarr.zip", ".ozx")
"""Suffixes of zarr in a zip file, which isn't read."""

_AXES = "TCZYX"
_UNNAMED_AXES = "UVWIQTZYX"

_MOST_TASKS = 100_000
"""Chunks are joined in lazy arrays that would have more of them."""

_NODES = ("zarr.json", ".zgroup", ".zarray")


def is_zarr(path: Path) -> bool:
    """Whether a folder is a zarr group or a zarr array."""
    return any((path / name).is_file() for name in _NODES)


@dataclass(frozen=True)
class _Image:
    """One image of a zarr: its finest level and what is said about it."""

    array: Any
    axes: str
    units: tuple[str, ...]
    scale: tuple[float, ...]
    translate: tuple[float, ...]
    name: str = ""
    omero: Mapping[str, Any] = field(default_factory=dict)


def read_zarr(path: Path, series: int | None, lazy: bool | None) -> Volume:
    """The finest level of one of the images of an OME-Zarr, version 0.1 to 0.5, or a zarr array."""
    import zarr

    if not path.is_dir():
        raise FileFormatError(
            f"{path} is a file, and an OME-Zarr is a folder. If it is a zip file, unpack it first."
        )
    with refusing(path, "OME-Zarr"):
        node: Any = zarr.open(path, mode="r")
        images = list(_images(path, node))
    sizes = [math.prod(image.array.shape) for image in images]
    number = sizes.index(max(sizes)) if series is None else series
    if not 0 <= number < len(images):
        raise FileFormatError(
            f"{path} has {len(images)} image series, counted from 0: there is no series {number}."
        )
    image = images[number]
    notes = []
    if len(images) > 1 and series is None:
        named = f" ({image.name})" if image.name else ""
        notes.append(
            f"{path.name} holds {len(images)} images, counted from 0; number {number}{named}, the "
            "first of the largest, was read. Give a series to read another."
        )
    with refusing(path, "OME-Zarr"):
        _check_pixels(path, image.array)
        notes += check_chunks(path, image.array)
        data = _pixels(path, image.array, is_lazy(lazy, image.array.nbytes))
        missing = _missing_values(image.array)
    metadata: dict[str, Any] = {
        "source": str(path),
        "format": "zarr",
        "series": number,
        "series_count": len(images),
        "notes": notes,
    }
    if any(image.translate):
        metadata["placement"] = {"translate": list(image.translate)}
    return Volume(
        data=data,
        axes=image.axes,
        scale=image.scale,
        units=image.units,
        name=bare_name(path, ZARR_SUFFIXES),
        metadata=metadata | _display(image),
        missing=missing,
    )


# --- which images there are -----------------------------------------------------------------------


def _images(path: Path, node: Any) -> Iterator[_Image]:
    """The images of a node; labels aren't images.

    Raises
    ------
    FileFormatError
        if there is none, or none that goes before the others.
    """
    if hasattr(node, "shape"):
        yield _plain(node)
        return
    attributes: Mapping[str, Any] = node.attrs.asdict()
    described = attributes.get("ome", attributes)
    if "image-label" in described:
        raise FileFormatError(
            f"{path} holds labels, numbers of objects, which must not be averaged. Choose the "
            "image that they belong to."
        )
    if described.get("multiscales"):
        for image in described["multiscales"]:
            yield _described(node, image, described.get("omero") or {})
        return
    if "bioformats2raw.layout" in described:
        found = False
        for child in _numbered(node):
            inner = child.attrs.asdict()
            inner = inner.get("ome", inner)
            for image in inner.get("multiscales", ()):
                found = True
                yield _described(child, image, inner.get("omero") or {})
        if found:
            return
    yield _only_array(path, node, described)


def _numbered(group: Any) -> Iterator[Any]:
    """The groups 0, 1, 2, … of bioformats2raw's layout."""
    number = 0
    while str(number) in group:
        yield group[str(number)]
        number += 1


def _only_array(path: Path, group: Any, described: Mapping[str, Any]) -> _Image:
    """The one array of a group that doesn't describe its images."""
    example = _example(described)
    if example:
        raise FileFormatError(
            f"{path} is a zarr group without an image of OME-NGFF: a plate or a well. Choose one "
            f"of the images in it, such as {path / example}."
        )
    arrays = {name: array for name, array in group.arrays() if array.ndim >= 2}
    if len(arrays) > 1:
        names = ", ".join(sorted(arrays)[:5])
        raise FileFormatError(
            f"{path} doesn't say which of its {len(arrays)} arrays is the image. Choose one of "
            f"them, such as {path / min(arrays)}. Their names are {names}."
        )
    if not arrays:
        raise FileFormatError(
            f"{path} is a zarr group without an image of OME-NGFF. "
            "Choose one of the images in it, such as a field of a well."
        )
    return _plain(next(iter(arrays.values())))


def _example(described: Mapping[str, Any]) -> str:
    """Where in a plate or a well there is an image; nothing of any other group."""
    if described.get("plate"):
        wells = described["plate"].get("wells") or [{"path": "A/1"}]
        return f"{wells[0]['path']}/0"
    if described.get("well"):
        images = described["well"].get("images") or [{"path": "0"}]
        return str(images[0]["path"])
    return ""


def _plain(array: Any) -> _Image:
    """An array that nothing is said about but, in some, the names of its axes."""
    ndim = array.ndim
    if not 2 <= ndim <= len(_UNNAMED_AXES):
        raise ValueError(f"its shape is {array.shape}, and an image needs two axes or more")
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    letters = "".join(str(name)[:1].upper() for name in names or ())
    if len(letters) != ndim or len(set(letters)) != ndim or not {"Y", "X"} <= set(letters):
        letters = _UNNAMED_AXES[-ndim:]
    return _Image(array, letters, (PIXEL,) * ndim, (1.0,) * ndim, (0.0,) * ndim)


def _described(group: Any, image: Mapping[str, Any], omero: Mapping[str, Any]) -> _Image:
    """The finest level of an image, which is the first unless someone sorted them otherwise."""
    levels = image["datasets"]
    arrays = [(group[level["path"]], level) for level in levels[:1]]
    arrays += [(group[level["path"]], level) for level in levels[1:] if level["path"] in group]
    array, level = max(arrays, key=lambda one: math.prod(one[0].shape))
    axes, units = _axes(image, array.ndim)
    scale, translate = _transform([level, image], array.ndim)
    steps = [parse_step(step) for step in scale]
    return _Image(
        array=array,
        axes=axes,
        units=tuple(PIXEL if s is None else u for s, u in zip(steps, units, strict=True)),
        scale=tuple(1.0 if step is None else step for step in steps),
        translate=tuple(float(shift) for shift in translate),
        name=str(image.get("name") or ""),
        omero=omero if isinstance(omero, Mapping) else {},
    )


def _axes(image: Mapping[str, Any], ndim: int) -> tuple[str, tuple[str, ...]]:
    """Letters and units of the axes; versions before 0.3 have all five and before 0.4 no units."""
    described = image.get("axes") or list(_AXES[-ndim:])
    entries = [{"name": a} if isinstance(a, str) else a for a in described]
    if len(entries) != ndim:
        raise ValueError(f"the image has {ndim} axes, and {len(entries)} are described")
    letters = [_letter(entry) for entry in entries]
    if len(set(letters)) != ndim or not {"Y", "X"} <= set(letters):
        # Axes of space may have any names.
        in_space = [i for i, letter in enumerate(letters) if letter not in ("T", "C")]
        if not 2 <= len(in_space) <= 3:
            raise ValueError(f"its axes are called {', '.join(str(e['name']) for e in entries)}")
        for i, letter in zip(in_space, "ZYX"[-len(in_space) :], strict=True):
            letters[i] = letter
    return "".join(letters), tuple(parse_unit(entry.get("unit") or "") for entry in entries)


def _letter(entry: Mapping[str, Any]) -> str:
    name, type_ = str(entry["name"]), entry.get("type")
    if type_ == "space" and len(name) > 1:
        return ""
    return {"time": "T", "channel": "C"}.get(str(type_), name[:1].upper())


def _transform(
    described: Sequence[Mapping[str, Any]], ndim: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale and translation that the transformations of a level and then its image amount to."""
    scale, translate = np.ones(ndim), np.zeros(ndim)
    for part in described:
        for step in part.get("coordinateTransformations") or []:
            if step["type"] == "scale" and "scale" in step:
                factors = np.array(step["scale"], float).reshape(ndim)
                scale, translate = scale * factors, translate * factors
            elif step["type"] == "translation" and "translation" in step:
                translate = translate + np.array(step["translation"], float).reshape(ndim)
    return scale, np.where(np.isfinite(translate), translate, 0.0)


def _display(image: _Image) -> dict[str, Any]:
    """Names, colours and windows of the channels, as far as they are there for each."""
    channels: Any = image.omero.get("channels")
    count = image.array.shape[image.axes.index("C")] if "C" in image.axes else 1
    well_formed = isinstance(channels, list) and all(isinstance(c, Mapping) for c in channels)
    if not well_formed or len(channels) != count:
        return {}
    found: dict[str, Any] = {"omero": dict(image.omero)}
    if all(channel.get("label") for channel in channels):
        found["channel_names"] = [str(channel["label"]) for channel in channels]
    if count == 1 and (limits := window_of(channels[0])):
        found["contrast_limits"] = limits
    return found


def window_of(channel: Mapping[str, Any]) -> tuple[float, float] | None:
    """The intensities that are shown as black and as white, of a channel of an omero block."""
    try:
        window = channel["window"]
        start, end = float(window["start"]), float(window["end"])
    except (KeyError, TypeError, ValueError):
        return None
    return (start, end) if start < end and math.isfinite(end - start) else None


def colour_of(channel: Mapping[str, Any]) -> str:
    """The colour of a channel of an omero block as ``"#rrggbb"``; ``"gray"`` for white or none."""
    found = re.fullmatch("#?([0-9a-fA-F]{6})([0-9a-fA-F]{2})?", str(channel.get("color")))
    colour = found[1].lower() if found else "ffffff"
    return "gray" if colour in ("ffffff", "000000") else f"#{colour}"


# --- pixels ---------------------------------------------------------------------------------------


def _check_pixels(path: Path, array: Any) -> None:
    dtype = np.dtype(array.dtype)
    if dtype.kind not in "iufcb":
        raise FileFormatError(f"{path} holds values of type {dtype}, which are no intensities.")
    if not math.prod(array.shape):
        raise FileFormatError(f"{path} has no pixels: its shape is {array.shape}.")


@dataclass(frozen=True)
class _ZarrPixels(OnDisk):
    """An array of zarr in the machine's byte order, whose chunks may turn out to be damaged."""

    array: Any
    node: Path

    @property
    def stamped(self) -> Path:
        return self.node

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        native: np.dtype[Any] = np.dtype(self.array.dtype).newbyteorder("=")
        return native

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        self.check_unchanged()
        with refusing(self.path, "OME-Zarr"), readable(self.path):
            check_headers(self.node.parent, self.array, key)
            pixels = np.asarray(self.array[key])
        return pixels.astype(self.dtype, copy=False)

    def __dask_tokenize__(self) -> tuple[object, ...]:
        return str(self.path), self.stamp, self.array.path, self.shape


def _pixels(path: Path, array: Any, lazily: bool) -> Any:
    node = next(path / array.path / name for name in _NODES if (path / array.path / name).exists())
    pixels = _ZarrPixels(path, stamp_of(node), array, node)
    if not lazily:
        return pixels[...]
    import dask.array as da

    chunks: Any = array.chunks
    if math.prod(-(-n // size) for n, size in zip(array.shape, chunks, strict=True)) > _MOST_TASKS:
        chunks = da.core.normalize_chunks(  # type: ignore[no-untyped-call]
            "auto", array.shape, dtype=pixels.dtype, previous_chunks=chunks
        )
    return da.from_array(  # type: ignore[no-untyped-call]
        pixels, chunks=chunks, fancy=False, meta=np.empty((0,) * pixels.ndim, pixels.dtype)
    )


def _missing_values(array: Any) -> tuple[float, ...]:
    """Values that are no intensities: declared as such, or a fill value that can't be one."""
    dtype = np.dtype(array.dtype)
    declared = [array.attrs.get(name) for name in ("_FillValue", "missing_value")]
    values = [v for entry in declared for v in (entry if isinstance(entry, list) else [entry])]
    if _is_sentinel(array.fill_value, dtype):
        values.append(array.fill_value)
    found = []
    for value in values:
        try:
            # In the type of the pixels, as which they will be compared.
            number = float(np.asarray(value).astype(dtype, casting="unsafe"))
        except (TypeError, ValueError, OverflowError):
            continue  # xarray writes some in base 64; the fill value says the same
        if math.isfinite(number) and number not in found:
            found.append(number)
    return tuple(found)


_NETCDF_FILL = {"i1": -127, "i2": -32767, "u2": 65535, "i4": -2147483647, "u4": 4294967295}
_BEYOND_MEASURE = 1e19


def _is_sentinel(value: Any, dtype: np.dtype[Any]) -> bool:
    """Whether a fill value stands for "nothing was measured", rather than for an intensity."""
    if value is None or dtype.kind not in "iuf":
        return False
    number = float(value)
    if dtype.kind == "f":
        lowest = abs(number) >= float(np.finfo(dtype).max)
        return math.isfinite(number) and (
            lowest or abs(number) >= _BEYOND_MEASURE or number in (-999, -9999, -99999, -32768)
        )
    limits = np.iinfo(dtype)
    signed = dtype.kind == "i" and number in (limits.min, -999, -9999, -99999, -32768)
    return signed or number == _NETCDF_FILL.get(dtype.str[1:])
