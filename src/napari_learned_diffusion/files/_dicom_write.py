"""DICOM series in writing: derived from those that were read, or captured from other images."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError, LearnedDiffusionError
from napari_learned_diffusion.files._dicom import is_dicom_name
from napari_learned_diffusion.files._dicom_stream import read_elements
from napari_learned_diffusion.files._dicom_values import Extent, Values, decimal, values_for
from napari_learned_diffusion.files._extras import refusing, require
from napari_learned_diffusion.files._lazy import planes_of
from napari_learned_diffusion.files._units import MICROMETERS
from napari_learned_diffusion.files.volume import Volume

_NAME_LETTERS, _TEXT_LETTERS = 64, 1024
"""Letters of a short text of a header, and of a long one."""

_OF_STORED_NUMBERS = (
    "SmallestImagePixelValue",
    "LargestImagePixelValue",
    "SmallestPixelValueInSeries",
    "LargestPixelValueInSeries",
)
"""What a header says of the stored numbers, which are others now."""

_OF_STORING = ("PixelPaddingValue", "PixelPaddingRangeLimit", "RealWorldValueMappingSequence")
"""What a header says of stored numbers that are scaled in another way now."""

_TO_DISPLAY = ("WindowCenter", "WindowWidth", "WindowCenterWidthExplanation", "VOILUTSequence")
"""What a header says of the intensities to display, which are others for another quantity."""

_OF_ENCODING = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")

Source = tuple[str, Values]


def is_single(path: Path) -> bool:
    """Whether one file is written to a path, not a folder of them."""
    return is_dicom_name(path)


def foreign_in_series(folder: Path) -> Path | None:
    """The first thing in a folder that `write_dicom` wouldn't have made; None if there is none."""
    own = re.compile(r"\d{6,}\.dcm")
    entries = sorted(folder.iterdir())
    return next((e for e in entries if not (own.fullmatch(e.name) and e.is_file())), None)


def check_series(path: Path, volume: Volume) -> None:
    """Refuse what no series can be, and the name of a file for several slices.

    Raises
    ------
    FileFormatError
        with what to do.
    """
    if volume.axes not in ("YX", "ZYX"):
        raise FileFormatError(
            f"A DICOM series has the axes ZYX, and this image has {volume.axes}. "
            "Write OME-Zarr or TIFF."
        )
    number = math.prod(volume.data.shape[:-2])
    if is_single(path) and number > 1:
        raise FileFormatError(
            f"A DICOM series of {number} slices is a folder of files: give a name that doesn't end "
            f"in {path.suffix}."
        )


def write_dicom(path: Path, volume: Volume, _: str | None) -> None:
    """A folder with one file a slice; a file, where the name says so and there is one slice."""
    pydicom = require("pydicom", "dicom", "DICOM files")
    check_series(path, volume)
    if volume.data.dtype.kind not in "iuf":
        raise FileFormatError(
            f"DICOM can't hold pixels of type {volume.data.dtype}. Write OME-Zarr or TIFF."
        )
    number = math.prod(volume.data.shape[:-2])
    sources: Sequence[Source] = volume.metadata.get("dicom", {}).get("slices", [])
    series = _NewSeries(pydicom, volume)
    if len(sources) == number and series.are_of_this_shape(sources):
        scale = _new_scale(volume, sources)
    else:
        sources, scale = [], None
    if not is_single(path):
        path.mkdir()
    for index, plane in enumerate(planes_of(volume.data, plane_ndim=2)):
        target = path if is_single(path) else path / f"{index + 1:06d}.dcm"
        if not sources:
            dataset, stored = series.captured(index, plane), plane
            _save(dataset, stored, target)
            continue
        source, values = sources[index]
        stored = (scale or values).store(plane)
        with _copying_header(Path(source)):
            dataset = series.derived(Path(source))
            if scale is not None:
                series.rescale(dataset, scale)
            _save(dataset, stored, target)


@contextmanager
def _copying_header(source: Path) -> Iterator[None]:
    """Turn what the library raises on parts of a header that were never looked at into a sentence.

    Errors of the system pass, as do our own.
    """
    try:
        yield
    except (LearnedDiffusionError, MemoryError, OSError):
        raise
    except Exception as error:
        raise FileFormatError(
            f"The header of {source} can't be copied to the result ({error}). It may be damaged: "
            "export it again, or write OME-Zarr or TIFF."
        ) from error


def _new_scale(volume: Volume, sources: Sequence[Source]) -> Values | None:
    """None where every slice can be stored as its source is; else how to store them all.

    What was removed is negative where the source may hold no sign, maps lie within one of its
    steps, and a mean of few counts lies between them.
    """
    is_own_type = volume.data.dtype == np.result_type(*{values.dtype for _, values in sources})
    extent, fits = Extent(), True
    for plane, (_, values) in zip(planes_of(volume.data, plane_ndim=2), sources, strict=True):
        extent.add(plane)
        fits = fits and values.can_store(plane)
    # Floating point numbers of a source of whole ones are given so that nothing is rounded.
    if fits and (is_own_type or _are_whole(volume)):
        return None
    return values_for(extent)


def _are_whole(volume: Volume) -> bool:
    return all(
        plane.dtype.kind in "iu" or bool((np.rint(plane) == plane).all())
        for plane in planes_of(volume.data, plane_ndim=2)
    )


@dataclass
class _NewSeries:
    """Makes the headers of a series that is derived from another, or of a captured one."""

    pydicom: Any
    volume: Volume

    def __post_init__(self) -> None:
        uid = self.pydicom.uid.generate_uid
        self.series, self.study, self.frame = uid(), uid(), uid()
        self.note = self.volume.metadata.get("processing") or "Written by napari-learned-diffusion"
        self.quantity = self.volume.metadata.get("quantity")
        self.now = datetime.now()

    def are_of_this_shape(self, sources: Sequence[Source]) -> bool:
        """Whether slices have as many pixels as the volume's, so that their headers are true."""
        shape = self.volume.data.shape[-2:]
        headers = (self._header(Path(path), ["Rows", "Columns"]) for path, _ in sources)
        return all((int(h.Rows), int(h.Columns)) == shape for h in headers)

    def _header(self, path: Path, tags: list[str] | None) -> Any:
        if not path.is_file():
            raise FileFormatError(
                f"{path} is gone, whose header the result would get. Put it back, or write "
                "OME-Zarr or TIFF."
            )
        with refusing(path, "DICOM"):
            return read_elements(path, self.pydicom, tags, before_pixels=True)

    def derived(self, path: Path) -> Any:
        """The header of a slice that was computed from the slice at ``path``."""
        pydicom = self.pydicom
        dataset = self._header(path, None)
        if "SOPClassUID" not in dataset:  # of programs that leave it out
            dataset.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
        if "SOPInstanceUID" in dataset:
            reference = pydicom.Dataset()
            reference.ReferencedSOPClassUID = dataset.SOPClassUID
            reference.ReferencedSOPInstanceUID = dataset.SOPInstanceUID
            dataset.SourceImageSequence = [reference]
        kind = list(dataset.get("ImageType") or ["ORIGINAL", "PRIMARY"])
        dataset.ImageType = ["DERIVED", *kind[1:]]
        dataset.DerivationDescription = self.note[:_TEXT_LETTERS]
        what = self.quantity or "denoised"
        description = f"{dataset.get('SeriesDescription', '')} {what}".strip()
        dataset.SeriesDescription = description[-_NAME_LETTERS:]
        _remove(dataset, _OF_STORED_NUMBERS + _OF_ENCODING)
        if self.quantity is not None:
            _remove(dataset, _TO_DISPLAY)
        self._name(dataset)
        return dataset

    def rescale(self, dataset: Any, values: Values) -> None:
        """Have the header say that numbers are stored in another way than the source's."""
        _remove(dataset, _OF_STORING)
        dataset.BitsAllocated = 8 * values.rescale.stored.itemsize
        dataset.BitsStored, dataset.HighBit = values.bits, values.bits - 1
        dataset.PixelRepresentation = int(values.is_signed)
        dataset.RescaleSlope = decimal(values.rescale.slope)
        dataset.RescaleIntercept = decimal(values.rescale.intercept)
        if "RescaleType" not in dataset:
            dataset.RescaleType = "US"  # unspecified
        if values.padding is not None:
            dataset.add_new("PixelPaddingValue", "SS", values.padding[0])
        limits = self.volume.metadata.get("contrast_limits")
        if limits is not None:
            _remove(dataset, _TO_DISPLAY)
            dataset.WindowCenter = decimal((limits[0] + limits[1]) / 2)
            dataset.WindowWidth = decimal(max(limits[1] - limits[0], values.rescale.slope))

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
        dataset.SeriesDescription = volume.name[:_NAME_LETTERS]
        dataset.DerivationDescription = self.note[:_TEXT_LETTERS]
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
        equipment.ContributionDescription = self.note[:_TEXT_LETTERS]
        purpose = self.pydicom.Dataset()
        purpose.CodeValue, purpose.CodingSchemeDesignator = "109102", "DCM"
        purpose.CodeMeaning = "Processing Equipment"
        equipment.PurposeOfReferenceCodeSequence = [purpose]
        known = list(dataset.get("ContributingEquipmentSequence") or [])
        dataset.ContributingEquipmentSequence = [*known, equipment]


def _remove(dataset: Any, names: Sequence[str]) -> None:
    for name in names:
        if name in dataset:
            delattr(dataset, name)


def _save(dataset: Any, stored: NDArray[Any], path: Path) -> None:
    # Written by name and not through pydicom's set_pixel_data, which changes the rescaling.
    content = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    dataset.add_new("PixelData", "OB" if stored.dtype.itemsize == 1 else "OW", content)
    if len(content) % 2:
        dataset.PixelData += b"\0"
    dataset.save_as(path, enforce_file_format=True)
