"""DICOM series: folders of slices of CT and MRI."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._dicom_pixels import check_decodable, decoded
from napari_learned_diffusion.files._dicom_stream import is_dicom, read_elements
from napari_learned_diffusion.files._dicom_values import Values
from napari_learned_diffusion.files._extras import refusing, require
from napari_learned_diffusion.files._honest import check_claimed
from napari_learned_diffusion.files._lazy import PlanesOnDisk, is_lazy, stamp_of
from napari_learned_diffusion.files._units import UNKNOWN, Step, parse_step
from napari_learned_diffusion.files.volume import Volume, bare_name

DICOM_SUFFIXES = (".dicom", ".dcm", ".ima")

_SAME_PLACE = 1e-3
"""Part of the distance of slices below which two of them count as being at one place."""

_UNEVEN = 0.05
"""Part of the distance of slices by which one may be off before a slice counts as missing."""

_PARALLEL = 5e-3
"""Difference of direction cosines up to which planes count as parallel: a third of a degree."""

_NAMED = 3
"""Files, series and the like that a sentence names at most."""

_DIRECTORY = "1.2.840.10008.1.3.10"
"""Class of the files that list others, usually called DICOMDIR."""

_TAGS = [
    "BitsAllocated",
    "BitsStored",
    "Columns",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImagerPixelSpacing",
    "InstanceNumber",
    "NumberOfFrames",
    "PhotometricInterpretation",
    "PixelPaddingRangeLimit",
    "PixelPaddingValue",
    "PixelRepresentation",
    "PixelSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "Rows",
    "SOPClassUID",
    "SamplesPerPixel",
    "SeriesDescription",
    "SeriesInstanceUID",
    "SharedFunctionalGroupsSequence",
    "SliceThickness",
    "SpacingBetweenSlices",
]


@dataclass(frozen=True)
class _Slice:
    """One file of a series: what orders it, and how its numbers are to be understood."""

    path: Path
    series: str
    kind: str
    description: str
    number: int | None
    orientation: tuple[float, ...] | None
    position: float | None
    shape: tuple[int, int]
    spacing: tuple[float, float] | None
    thickness: float | None
    values: Values
    syntax: Any
    stamp: tuple[int, int]

    def belongs_to(self, other: _Slice) -> bool:
        """Whether both can be slices of one stack: parallel, of the same size and kind."""
        names = [(s.series, s.kind, s.shape, s.spacing is None) for s in (self, other)]
        if names[0] != names[1] or (self.orientation is None) != (other.orientation is None):
            return False
        if not np.allclose(self.spacing or 0, other.spacing or 0, rtol=_SAME_PLACE):
            return False
        return np.allclose(self.orientation or 0, other.orientation or 0, rtol=0, atol=_PARALLEL)

    @property
    def direction(self) -> str:
        """What doctors call the plane, or nothing."""
        if self.orientation is None:
            return ""
        rows, columns = np.abs(np.reshape(self.orientation, (2, 3)))
        in_plane = {int(rows.argmax()), int(columns.argmax())}
        names = ("sagittal", "coronal", "axial")  # by the axis that neither is along
        return next((names[i] for i in range(3) if in_plane == {0, 1, 2} - {i}), "")


class _NoSliceError(FileFormatError):
    """A file that is DICOM, but no slice of a series; ``reason`` goes on after its name."""

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(f"{path} {reason}. {remedy}")
        self.path, self.reason = path, reason


@dataclass
class _Folder:
    """What a folder holds: the stacks of slices, each in no order yet, and the other files."""

    stacks: list[list[_Slice]] = field(default_factory=list)
    others: list[_NoSliceError] = field(default_factory=list)

    def add(self, one: _Slice) -> None:
        stack = next((s for s in self.stacks if one.belongs_to(s[0])), None)
        if stack is None:
            self.stacks.append([one])
        else:
            stack.append(one)


# --- files ----------------------------------------------------------------------------------------


def files_of_series(folder: Path) -> list[Path]:
    """Files of a folder that are DICOM by their name or their content.

    Raises
    ------
    OSError
        if the folder, or a file that may be one of them, can't be read.
    """
    return [path for path in sorted(folder.iterdir()) if _may_be_slice(path)]


def is_series(folder: Path) -> bool:
    """Whether a folder holds DICOM files; raises OSError if it can't be read.

    A file that can't be read and isn't called as DICOM is counts as another.
    """
    for path in sorted(folder.iterdir()):
        with suppress(OSError):
            if _may_be_slice(path):
                return True
    return False


def is_dicom_name(path: Path) -> bool:
    """Whether a file is called as DICOM files are."""
    return path.name.lower().endswith(DICOM_SUFFIXES)


def _may_be_slice(path: Path) -> bool:
    """Scanners and archives name files by numbers and UIDs, so the suffix doesn't tell."""
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    return is_dicom_name(path) or is_dicom(path)


def read_dicom(path: Path, series: int | None, lazy: bool | None) -> Volume:
    """A file as a plane, or a folder's series in order of position; values rescaled, such as HU."""
    if not path.is_dir():
        volume = read_dicom_files(path, [path], series, lazy)
        return _without_depth(volume)
    return read_dicom_files(path, files_of_series(path), series, lazy)


def read_dicom_files(
    path: Path, files: Sequence[Path], series: int | None, lazy: bool | None
) -> Volume:
    """One of the series that files hold, in order of position.

    Parameters
    ----------
    path
        What the user chose, for names and messages.
    files
        The files to look through.
    series
        Which of the series, counted from 0 in the order of the files; ``None``: the largest.
    lazy
        As of `read`.

    Raises
    ------
    FileFormatError
        if there is no such series, or it can't be read.
    MissingDependencyError
        if the pixels are compressed in a way that needs a library which isn't there.
    """
    pydicom = require("pydicom", "dicom", "DICOM files")
    found = _Folder()
    for file in files:
        try:
            found.add(_look_at(file, pydicom))
        except _NoSliceError as other:
            found.others.append(other)
    number = _choose(path, found, series)
    chosen = _in_order(found.stacks[number])
    for one in chosen:
        _check_readable(one, pydicom)
    kinds = {s.values for s in chosen}
    dtype = np.result_type(*{values.dtype for values in kinds})
    planes = PlanesOnDisk(
        path=chosen[0].path,
        read_plane=_Planes(chosen, dtype),
        shape=(len(chosen), *chosen[0].shape),
        dtype=dtype,
        plane_ndim=2,
        stamp=chosen[0].stamp,
        series=number,
    )
    steps = [_distance(chosen), *_spacing(chosen[0])]
    lazily = is_lazy(lazy, math.prod(planes.shape) * dtype.itemsize)
    return Volume(
        data=planes.as_dask() if lazily else planes[:, :, :],
        axes="ZYX",
        scale=tuple(step for step, _ in steps),
        units=tuple(unit for _, unit in steps),
        name=bare_name(path, DICOM_SUFFIXES),
        metadata={
            "source": str(path),
            "format": "dicom",
            "series": number,
            "series_count": len(found.stacks),
            "notes": [
                *_notes_on_choice(path, found, number, series),
                *_notes_on_others(path, found.others),
                *_notes_on_places(chosen),
            ],
            "dicom": {"slices": [(str(s.path), s.values) for s in chosen]},
        },
        missing=tuple(sorted({m for values in kinds for m in values.missing(dtype)})),
    )


def _without_depth(volume: Volume) -> Volume:
    return Volume(
        data=volume.data[0],
        axes=volume.axes[1:],
        scale=volume.scale[1:],
        units=volume.units[1:],
        name=volume.name,
        metadata=volume.metadata,
        missing=volume.missing,
    )


# --- headers --------------------------------------------------------------------------------------


def _look_at(path: Path, pydicom: Any) -> _Slice:
    """Read the header of a file.

    Raises
    ------
    _NoSliceError
        if it is something else than a slice.
    """
    with refusing(path, "DICOM"):
        dataset = read_elements(path, pydicom, _TAGS, before_pixels=True)
        _check_is_slice(path, dataset, pydicom)
        spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing")
        orientation = dataset.get("ImageOrientationPatient")
        number = dataset.get("InstanceNumber")
        return _Slice(
            path=path,
            series=str(dataset.get("SeriesInstanceUID", "")),
            kind=str(dataset.get("SOPClassUID", "")),
            description=str(dataset.get("SeriesDescription") or ""),
            number=None if number is None else int(number),
            orientation=None if not orientation else tuple(float(c) for c in orientation),
            position=_position(dataset),
            shape=(int(dataset.Rows), int(dataset.Columns)),
            spacing=None if not spacing else (float(spacing[0]), float(spacing[1])),
            thickness=parse_step(
                dataset.get("SpacingBetweenSlices") or dataset.get("SliceThickness")
            ),
            values=Values.of(dataset),
            syntax=dataset.file_meta.TransferSyntaxUID,
            stamp=stamp_of(path),
        )


def _check_is_slice(path: Path, dataset: Any, pydicom: Any) -> None:
    """Refuse reports, colour images, sequences of frames and whatever else isn't one plane."""
    kind = str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    if kind == _DIRECTORY:
        raise _NoSliceError(path, "is a directory of other files", "Choose the folder of a series.")
    if not dataset.get("Rows") or not dataset.get("Columns") or "BitsAllocated" not in dataset:
        name = pydicom.uid.UID(kind).name if kind else "of unknown kind"
        raise _NoSliceError(
            path,
            f"holds no image ({name.removesuffix(' Storage')})",
            "Choose the folder of a series of slices.",
        )
    if int(dataset.get("SamplesPerPixel") or 1) != 1 or _is_palette(dataset):
        raise _NoSliceError(path, "is a colour image", "Split it into its channels.")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1 or "SharedFunctionalGroupsSequence" in dataset:
        raise _NoSliceError(
            path,
            f"holds several frames ({frames}), or is of an enhanced kind that may do so",
            "Convert it to a series of single files first, for instance with dcm4che's emf2sf.",
        )
    bits = int(dataset.BitsAllocated)
    if bits not in (8, 16, 32, 64) or "PixelRepresentation" not in dataset:
        raise _NoSliceError(
            path,
            f"holds pixels of {bits} bit that are no whole numbers of 8, 16, 32 or 64",
            "Convert it first.",
        )


def _is_palette(dataset: Any) -> bool:
    return "PALETTE" in str(dataset.get("PhotometricInterpretation") or "").upper()


def _position(dataset: Any) -> float | None:
    """Place of a slice along the normal of its plane, in millimetres."""
    place, orientation = dataset.get("ImagePositionPatient"), dataset.get("ImageOrientationPatient")
    if not place or not orientation:
        return None
    rows, columns = np.reshape(np.array(orientation, float), (2, 3))
    position = float(np.dot(np.cross(rows, columns), np.array(place, float)))
    return position if math.isfinite(position) else None


def _check_readable(one: _Slice, pydicom: Any) -> None:
    """Refuse what can't be decoded, and claims of more pixels than the file can hold.

    Raises
    ------
    FileFormatError, MissingDependencyError
        with what to do.
    """
    with refusing(one.path, "DICOM"):
        encapsulated = bool(one.syntax.is_encapsulated)
    compressed = encapsulated or one.syntax.is_deflated
    check_claimed(one.path, one.shape, one.values.rescale.stored, compressed=compressed)
    if encapsulated:
        check_decodable(one.path, one.syntax, pydicom)


# --- series ---------------------------------------------------------------------------------------


def _choose(path: Path, found: _Folder, wanted: int | None) -> int:
    """Which stack to take: the wanted one, or the first of those with the most pixels."""
    count = len(found.stacks)
    if not count:
        if found.others:
            raise found.others[0]
        raise FileFormatError(f"{path} holds no DICOM files. Choose the folder of a series.")
    if wanted is not None and not 0 <= wanted < count:
        raise FileFormatError(
            f"{path} has {count} series, counted from 0: there is no series {wanted}."
        )
    sizes = [len(stack) * math.prod(stack[0].shape) for stack in found.stacks]
    return sizes.index(max(sizes)) if wanted is None else wanted


def _in_order(stack: Sequence[_Slice]) -> list[_Slice]:
    placed = all(s.position is not None for s in stack)
    return sorted(stack, key=lambda s: ((s.position or 0.0) if placed else 0.0, s.number or 0))


def _gaps(slices: Sequence[_Slice]) -> list[float]:
    """Distances from slice to slice, in millimetres; none where a position isn't known."""
    places = [s.position for s in slices if s.position is not None]
    if len(places) < len(slices):
        return []
    return [after - before for before, after in pairwise(places)]


def _distance(slices: Sequence[_Slice]) -> Step:
    """The usual distance of the slices."""
    apart = [gap for gap in _gaps(slices) if gap > _SAME_PLACE]
    step = parse_step(round(float(np.median(apart)), 6)) if apart else slices[0].thickness
    return UNKNOWN if step is None else (step, "millimeter")


def _spacing(one: _Slice) -> list[Step]:
    steps = [parse_step(step) for step in one.spacing or (None, None)]
    return [UNKNOWN if step is None else (step, "millimeter") for step in steps]


# --- what people are told -------------------------------------------------------------------------


def _notes_on_choice(path: Path, found: _Folder, number: int, wanted: int | None) -> Iterator[str]:
    """A sentence about the other series, where the user chose none."""
    if wanted is not None or len(found.stacks) == 1:
        return
    count = len(found.stacks)
    listed = ", ".join(f"{i} ({_described(s)})" for i, s in enumerate(found.stacks[: 2 * _NAMED]))
    more = ", …" if count > 2 * _NAMED else ""
    other = (number + 1) % count
    yield (
        f"{path} holds {count} series, each orientation and size counted: {listed}{more}. Series "
        f"{number} was read, which has the most pixels. Choose another by its number (series="
        f"{other}, in a shell --series {other}), or put each into a folder of its own."
    )


def _described(stack: Sequence[_Slice]) -> str:
    one = stack[0]
    words = [f"{len(stack)} × {one.shape[0]} × {one.shape[1]}", one.direction, one.description]
    return " ".join(word for word in words if word)


def _notes_on_others(path: Path, others: Sequence[_NoSliceError]) -> Iterator[str]:
    """A sentence about files that are no slices."""
    told = [other for other in others if not other.reason.startswith("is a directory")]
    if told:
        listed = ", ".join(f"{o.path.name} {o.reason}" for o in told[:_NAMED])
        more = ", …" if len(told) > _NAMED else ""
        files = "1 file" if len(told) == 1 else f"{len(told)} files"
        yield f"{files} of {path} left out as no slice of a series: {listed}{more}."


def _notes_on_places(slices: Sequence[_Slice]) -> Iterator[str]:
    """Sentences about slices that are missing or there twice, or whose order isn't known."""
    folder = slices[0].path.parent
    gaps = _gaps(slices)
    usual = _distance(slices)[0]
    numbers = [s.number for s in slices]
    if not gaps and len(slices) > 1 and (None in numbers or len(set(numbers)) < len(numbers)):
        yield (
            f"The slices of {folder} tell neither where they are nor, each, a number of their own: "
            "their order is that of the files' names."
        )
    doubled = [i + 1 for i, gap in enumerate(gaps) if gap <= _SAME_PLACE * usual]
    if doubled:
        names = ", ".join(slices[i].path.name for i in doubled[:_NAMED])
        yield (
            f"{len(doubled)} slices of {folder} lie where another one does, such as {names}. "
            "All were kept; check whether the series holds two acquisitions."
        )
    wide = [i for i, gap in enumerate(gaps) if gap > (1 + _UNEVEN) * usual]
    if wide:
        names = f"{slices[wide[0]].path.name} and {slices[wide[0] + 1].path.name}"
        lacking = sum(max(1, round(gaps[i] / usual) - 1) for i in wide)
        yield (
            f"About {lacking} slices of {folder} are missing or unevenly spaced, the first between "
            f"{names}. Slices are denoised one by one, so the others don't suffer."
        )


# --- pixels ---------------------------------------------------------------------------------------


class _Planes:
    """Reads the pixels of a series' files."""

    def __init__(self, slices: Sequence[_Slice], dtype: np.dtype[Any]) -> None:
        self._slices, self._dtype = slices, dtype

    def __call__(self, index: int) -> NDArray[Any]:
        pydicom = require("pydicom", "dicom", "DICOM files")
        one = self._slices[index]
        if stamp_of(one.path) != one.stamp:
            raise FileFormatError(
                f"{one.path} has changed since it was opened. Open the image again."
            )
        with refusing(one.path, "DICOM"):
            dataset = read_elements(one.path, pydicom)
            # The bits above those that are used can hold anything; but padding may use them.
            dataset.pixel_array_options(correct_unused_bits=not one.values.is_padded_beyond)
            stored = decoded(one.path, dataset, one.shape, pydicom)
            return one.values.apply(stored, self._dtype)
