"""DICOM series: folders of slices of CT and MRI, and series derived from them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._extras import refusing, require
from napari_learned_diffusion.files._lazy import PlanesOnDisk, is_lazy, planes_of, stamp_of
from napari_learned_diffusion.files._rescale import Rescale
from napari_learned_diffusion.files._units import MICROMETERS, UNKNOWN, Step, parse_step
from napari_learned_diffusion.files.volume import Volume

DICOM_SUFFIXES = (".dicom", ".dcm", ".ima")

_PREAMBLE = 128
_MAGIC = b"DICM"
_SAME_PLACE = 1e-3
"""Part of the distance of slices below which two of them count as being at one place."""

_UNEVEN = 0.05
"""Part of the distance of slices by which one may be off before a slice counts as missing."""


@dataclass(frozen=True)
class _Slice:
    """One file of a series: what orders it, and how its numbers are to be understood."""

    path: Path
    series: str
    number: int
    position: float | None
    shape: tuple[int, int]
    spacing: tuple[float, float] | None
    thickness: float | None
    rescale: Rescale
    limits: tuple[int, int]
    stamp: tuple[int, int]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.rescale.value_type(*self.limits))


def is_dicom(path: Path) -> bool:
    """Whether a file's content says that it is DICOM."""
    with path.open("rb") as stream:
        stream.seek(_PREAMBLE)
        return stream.read(len(_MAGIC)) == _MAGIC


def files_of_series(folder: Path) -> list[Path]:
    """Files of a folder that are DICOM by their name or, without a suffix, by their content."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name.upper() != "DICOMDIR"
        and (path.name.lower().endswith(DICOM_SUFFIXES) or (not path.suffix and is_dicom(path)))
    ]


def read_dicom(path: Path, series: int | None, lazy: bool | None) -> Volume:
    """A file as a plane, or a folder's series in order of position; values rescaled, such as HU."""
    pydicom = require("pydicom", "dicom", "DICOM files")
    files = files_of_series(path) if path.is_dir() else [path]
    slices = [_look_at(file, pydicom) for file in files]
    count = Counter(s.series for s in slices)
    chosen, number = _choose(path, slices, list(count), series)
    notes = list(_notes(chosen))
    if series is None and len(count) > 1:
        notes.append(
            f"{path} holds {len(count)} series; the one with the most slices was taken. "
            "Put the others into folders of their own to process them, too."
        )
    _check_shapes(chosen)
    dtype = np.result_type(*(s.dtype for s in chosen))
    planes = PlanesOnDisk(
        path=chosen[0].path,
        read_plane=_Planes(chosen, dtype),
        shape=(len(chosen), *chosen[0].shape),
        dtype=dtype,
        plane_ndim=2,
        stamp=chosen[0].stamp,
        series=number,
    )
    lazily = is_lazy(lazy, math.prod(planes.shape) * dtype.itemsize)
    data = planes.as_dask() if lazily else planes[:, :, :]
    axes, steps = "ZYX", [_distance(chosen), *_spacing(chosen[0])]
    if not path.is_dir():
        data, axes, steps = data[0], axes[1:], steps[1:]
    return Volume(
        data=data,
        axes=axes,
        scale=tuple(step for step, _ in steps),
        units=tuple(unit for _, unit in steps),
        name=path.stem if path.is_file() else path.name,
        metadata={
            "source": str(path),
            "format": "dicom",
            "series": number,
            "series_count": len(count),
            "notes": notes,
            "dicom": {"slices": [(str(s.path), s.rescale) for s in chosen]},
        },
    )


def _look_at(path: Path, pydicom: Any) -> _Slice:
    """Read the header of a file."""
    with refusing(path, "DICOM"):
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        if int(dataset.get("SamplesPerPixel", 1)) != 1:
            raise FileFormatError(f"{path} is a colour image. Split it into its channels.")
        if int(dataset.get("NumberOfFrames", 1)) > 1:
            raise FileFormatError(
                f"{path} holds several frames. Convert it to a series of single files first, "
                "for instance with dcm4che's emf2sf."
            )
        if "Rows" not in dataset or "BitsAllocated" not in dataset:
            raise FileFormatError(f"{path} holds no image.")
        bits = int(dataset.BitsAllocated)
        used = int(dataset.get("BitsStored", bits))
        signed = bool(dataset.PixelRepresentation)
        stored = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
        slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
        spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing")
        return _Slice(
            path=path,
            series=str(dataset.get("SeriesInstanceUID", "")),
            number=int(dataset.get("InstanceNumber") or 0),
            position=_position(dataset),
            shape=(int(dataset.Rows), int(dataset.Columns)),
            spacing=None if not spacing else (float(spacing[0]), float(spacing[1])),
            thickness=parse_step(
                dataset.get("SpacingBetweenSlices") or dataset.get("SliceThickness")
            ),
            rescale=Rescale(stored, float(slope or 1), float(intercept or 0)),
            limits=(-(1 << used - 1), (1 << used - 1) - 1) if signed else (0, (1 << used) - 1),
            stamp=stamp_of(path),
        )


def _position(dataset: Any) -> float | None:
    """Place of a slice along the normal of its plane, in millimetres."""
    place, orientation = dataset.get("ImagePositionPatient"), dataset.get("ImageOrientationPatient")
    if not place or not orientation:
        return None
    rows, columns = np.reshape(np.array(orientation, float), (2, 3))
    return float(np.dot(np.cross(rows, columns), np.array(place, float)))


def _choose(
    path: Path, slices: list[_Slice], names: list[str], wanted: int | None
) -> tuple[list[_Slice], int]:
    """The slices of one series in order of position, and the number of the series."""
    if not slices:
        raise FileFormatError(f"{path} holds no DICOM files. Choose the folder of a series.")
    if wanted is not None and not 0 <= wanted < len(names):
        raise FileFormatError(
            f"{path} has {len(names)} series, counted from 0: there is no series {wanted}."
        )
    groups = [[s for s in slices if s.series == name] for name in names]
    number = wanted if wanted is not None else max(range(len(names)), key=lambda i: len(groups[i]))
    group = groups[number]
    placed = all(s.position is not None for s in group)
    return sorted(group, key=lambda s: (s.position if placed else 0.0, s.number)), number


def _check_shapes(slices: Sequence[_Slice]) -> None:
    for one in slices:
        if one.shape != slices[0].shape:
            raise FileFormatError(
                f"{one.path} has {one.shape[0]} × {one.shape[1]} pixels, but {slices[0].path} of "
                f"the same series {slices[0].shape[0]} × {slices[0].shape[1]}. "
                "Put them into folders of their own."
            )


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


def _notes(slices: Sequence[_Slice]) -> Iterator[str]:
    """Sentences about slices that are missing or there twice."""
    folder = slices[0].path.parent
    gaps = _gaps(slices)
    usual = _distance(slices)[0]
    doubled = [i + 1 for i, gap in enumerate(gaps) if gap <= _SAME_PLACE * usual]
    if doubled:
        names = ", ".join(slices[i].path.name for i in doubled[:3])
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
            return one.rescale.apply(pydicom.dcmread(one.path).pixel_array, self._dtype)


# --- writing --------------------------------------------------------------------------------------


def write_dicom(path: Path, volume: Volume, _: str | None) -> None:
    """A folder with one file a slice; a file, where the name says so and there is one slice."""
    pydicom = require("pydicom", "dicom", "DICOM files")
    if volume.axes not in ("YX", "ZYX"):
        raise FileFormatError(
            f"A DICOM series has the axes ZYX, and this image has {volume.axes}. "
            "Write OME-Zarr or TIFF."
        )
    planes = planes_of(volume.data, plane_ndim=2)
    number = 1 if volume.axes == "YX" else volume.data.shape[0]
    single = is_single(path)
    if single and number > 1:
        raise FileFormatError(
            "A DICOM series is a folder of files: give a name that doesn't end in .dcm."
        )
    sources = volume.metadata.get("dicom", {}).get("slices", [])
    if len(sources) != number:
        sources = [None] * number
    series = _NewSeries(pydicom, volume)
    if not single:
        path.mkdir()
    for index, (plane, source) in enumerate(zip(planes, sources, strict=True)):
        dataset = series.derived(*source) if source else series.captured(index, plane)
        rescale = source[1] if source else Rescale(plane.dtype)
        _set_pixels(dataset, plane, rescale)
        target = path if single else path / f"{index + 1:06d}.dcm"
        dataset.save_as(target, enforce_file_format=True)


def is_single(path: Path) -> bool:
    """Whether one file is written to a path, not a folder of them."""
    return path.name.lower().endswith(DICOM_SUFFIXES)


def foreign_in_series(folder: Path) -> Path | None:
    """The first thing in a folder that `write_dicom` wouldn't have made; None if there is none."""
    own = re.compile(r"\d{6,}\.dcm")
    entries = sorted(folder.iterdir())
    return next((e for e in entries if not (own.fullmatch(e.name) and e.is_file())), None)


@dataclass
class _NewSeries:
    """Makes the headers of a series that is derived from another, or of a captured one."""

    pydicom: Any
    volume: Volume

    def __post_init__(self) -> None:
        uid = self.pydicom.uid.generate_uid
        self.series, self.study, self.frame = uid(), uid(), uid()
        self.note = self.volume.metadata.get("processing") or "Written by napari-learned-diffusion"
        self.now = datetime.now()

    def derived(self, path: str, _: Rescale) -> Any:
        """The header of a slice that was computed from the slice at ``path``."""
        pydicom = self.pydicom
        with refusing(Path(path), "DICOM"):
            dataset = pydicom.dcmread(path, stop_before_pixels=True)
        reference = pydicom.Dataset()
        reference.ReferencedSOPClassUID = dataset.SOPClassUID
        reference.ReferencedSOPInstanceUID = dataset.SOPInstanceUID
        dataset.SourceImageSequence = [reference]
        kind = list(dataset.get("ImageType") or ["ORIGINAL", "PRIMARY"])
        dataset.ImageType = ["DERIVED", *kind[1:]]
        dataset.DerivationDescription = self.note[:1024]
        description = f"{dataset.get('SeriesDescription', '')} denoised".strip()
        dataset.SeriesDescription = description[-64:]
        self._name(dataset)
        return dataset

    def captured(self, index: int, plane: NDArray[Any]) -> Any:
        """The header of a slice that no DICOM file is known for: secondary capture, anonymous."""
        pydicom, volume = self.pydicom, self.volume
        if plane.dtype.kind not in "iu" or plane.dtype.itemsize > 2:
            raise FileFormatError(
                f"DICOM holds whole numbers of up to 16 bits, and this image is of {plane.dtype}. "
                "Write OME-Zarr, NIfTI or TIFF, or convert it first."
            )
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
        dataset.StudyInstanceUID = self.study
        dataset.Modality, dataset.ConversionType = "OT", "WSD"
        dataset.PatientName = dataset.PatientID = dataset.StudyID = dataset.AccessionNumber = ""
        dataset.PatientBirthDate = dataset.PatientSex = dataset.ReferringPhysicianName = ""
        dataset.StudyDate, dataset.StudyTime = "", ""
        dataset.ImageType = ["DERIVED", "SECONDARY"]
        dataset.SeriesDescription = volume.name[:64]
        dataset.DerivationDescription = self.note[:1024]
        dataset.SeriesNumber, dataset.InstanceNumber = 1, index + 1
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.Rows, dataset.Columns = plane.shape
        dataset.BitsAllocated = dataset.BitsStored = 8 * plane.dtype.itemsize
        dataset.HighBit = dataset.BitsStored - 1
        dataset.PixelRepresentation = int(plane.dtype.kind == "i")
        self._place(dataset, index)
        self._name(dataset)
        return dataset

    def _place(self, dataset: Any, index: int) -> None:
        """Voxel size and place, where they are known in units of length."""
        lengths = {
            axis: step * MICROMETERS[unit] / MICROMETERS["millimeter"]
            for axis in self.volume.axes
            for step, unit in [self.volume.step(axis)]
            if unit in MICROMETERS
        }
        if {"X", "Y"} <= set(lengths):
            dataset.PixelSpacing = [lengths["Y"], lengths["X"]]
        if "Z" in lengths:
            dataset.FrameOfReferenceUID = self.frame
            dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            dataset.ImagePositionPatient = [0, 0, float(f"{index * lengths['Z']:.10g}")]

    def _name(self, dataset: Any) -> None:
        """UIDs of its own, the program, and the encoding that pixels will have."""
        uids = self.pydicom.uid
        dataset.SOPInstanceUID = uids.generate_uid()
        dataset.SeriesInstanceUID = self.series
        dataset.InstanceCreationDate = self.now.strftime("%Y%m%d")
        dataset.InstanceCreationTime = self.now.strftime("%H%M%S")
        meta = dataset.file_meta
        meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
        equipment = self.pydicom.Dataset()
        equipment.Manufacturer = "napari-learned-diffusion"
        equipment.ContributionDescription = self.note[:1024]
        purpose = self.pydicom.Dataset()
        purpose.CodeValue, purpose.CodingSchemeDesignator = "109102", "DCM"
        purpose.CodeMeaning = "Processing Equipment"
        equipment.PurposeOfReferenceCodeSequence = [purpose]
        known = list(dataset.get("ContributingEquipmentSequence") or [])
        dataset.ContributingEquipmentSequence = [*known, equipment]


def _set_pixels(dataset: Any, plane: NDArray[Any], rescale: Rescale) -> None:
    used = int(dataset.BitsStored)
    signed = bool(dataset.PixelRepresentation)
    lowest, highest = (-(1 << used - 1), (1 << used - 1) - 1) if signed else (0, (1 << used) - 1)
    stored = rescale.undo(plane, lowest, highest)
    for name in ("SmallestImagePixelValue", "LargestImagePixelValue"):
        if name in dataset:
            delattr(dataset, name)
    # Written by name and not through pydicom's set_pixel_data, which changes the rescaling.
    content = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    dataset.add_new("PixelData", "OB" if stored.dtype.itemsize == 1 else "OW", content)
    if len(content) % 2:
        dataset.PixelData += b"\0"
