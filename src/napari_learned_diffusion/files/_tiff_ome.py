"""OME-XML: what it says about the images of a TIFF, and how it comes back with new pixels."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from napari_learned_diffusion.files._units import Step, parse_step, parse_unit

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from tifffile import TiffFile

OME_SUFFIXES = (".ome.tif", ".ome.tiff", ".ome.btf", ".ome.tf8", ".ome.tf2")
"""Ends of names that promise an OME-TIFF."""

_LAYOUT = (
    *("ID", "DimensionOrder", "Type", "SizeX", "SizeY", "SizeZ", "SizeC", "SizeT", "Interleaved"),
    *("BigEndian",),
)
"""Attributes of Pixels that say how they are stored."""


class OmeImages:
    """The Image elements of an OME-TIFF, each with the series that tifffile makes of it."""

    def __init__(self, tif: TiffFile) -> None:
        self.text = tif.ome_metadata or "<OME/>"
        self.root = ElementTree.fromstring(self.text)
        images = self.root.findall("{*}Image")
        if len(images) != len(tif.series):
            # Images without pixels are no series of tifffile's: then only the name tells.
            by_name = {image.get("Name", ""): image for image in reversed(images)}
            self._images = [by_name.get(series.name) for series in tif.series]
        else:
            self._images = list(images)

    def name(self, number: int) -> str:
        """Name of a series, or its number."""
        image = self._images[number]
        return str(number) if image is None else image.get("Name") or str(number)

    def ids(self, numbers: Iterable[int]) -> list[str]:
        """What the images of series are called within the XML."""
        images = (self._images[number] for number in numbers)
        return ["" if image is None else image.get("ID", "") for image in images]

    def calibration(self, number: int) -> tuple[dict[str, Step], dict[str, Any]]:
        """Steps and metadata of a series."""
        steps: dict[str, Step] = {}
        metadata: dict[str, Any] = {"format": "OME-TIFF"}
        image = self._images[number]
        pixels = None if image is None else image.find("{*}Pixels")
        if pixels is None:
            return steps, metadata
        for axis in "XYZ":
            if (size := parse_step(pixels.get(f"PhysicalSize{axis}"))) is not None:
                steps[axis] = (size, parse_unit(pixels.get(f"PhysicalSize{axis}Unit", "µm")))
        if (interval := parse_step(pixels.get("TimeIncrement"))) is not None:
            steps["T"] = (interval, parse_unit(pixels.get("TimeIncrementUnit", "s")))
        names = [channel.get("Name") for channel in pixels.findall("{*}Channel")]
        if any(names):
            metadata["channel_names"] = [name or f"channel {i}" for i, name in enumerate(names)]
        return steps, metadata

    @cached_property
    def mapped(self) -> dict[str, str]:
        """Texts of the map annotations by their keys, of each key the first."""
        pairs = [(e.get("K"), e.text) for e in self.root.iter() if e.get("K") is not None]
        return {str(key): text or "" for key, text in reversed(pairs)}


def merged(written: str, source: Mapping[str, Any]) -> str:
    """The XML of a file just written, with all that the XML of its source says beside.

    Parameters
    ----------
    written
        XML that describes the pixels as they are stored now.
    source
        ``xml`` of the file that was read, and the ``images`` in it that the written ones come
        from, by their IDs.

    Returns
    -------
    str
        The source's XML: of its images those that were written, with their layout, type and voxel
        size as in ``written``. Channels and planes keep what is said about them where there are
        as many as before. ``written`` itself if the images don't correspond.
    """
    new = _without_namespace(ElementTree.fromstring(written))
    old = _without_namespace(ElementTree.fromstring(source["xml"]))
    images = {image.get("ID", ""): image for image in old.findall("Image")}
    made = new.findall("Image")
    wanted = list(source["images"])
    if len(made) != len(wanted) or not set(wanted) <= images.keys():
        return written
    for identifier, image in images.items():
        if identifier not in wanted:
            old.remove(image)
    _drop(old, lambda e: e.tag == "ImageRef" and e.get("ID") not in wanted)
    _drop(old, lambda e: e.tag == "BinaryOnly")
    _replace_own_annotations(old, new)
    for identifier, image in zip(wanted, made, strict=True):
        _update_image(images[identifier], image)
    old.set("UUID", new.get("UUID", ""))
    declaration = '<?xml version="1.0" encoding="UTF-8"?>'
    return declaration + ElementTree.tostring(old, encoding="unicode")


def _without_namespace(root: Element) -> Element:
    """The same tree with the root's namespace as default, not as a prefix of every tag."""
    namespace, closing, _ = root.tag.removeprefix("{").partition("}")
    if not closing:
        return root
    prefix = f"{{{namespace}}}"
    for element in root.iter():
        if isinstance(element.tag, str):
            element.tag = element.tag.removeprefix(prefix)
    root.set("xmlns", namespace)
    return root


def _drop(root: Element, unwanted: Any) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if unwanted(child):
                parent.remove(child)


def _replace_own_annotations(old: Element, new: Element) -> None:
    """Put the annotations of what was written in place of older ones of the same namespace."""
    added = new.find("StructuredAnnotations")
    annotations = [] if added is None else [*added]
    known = old.find("StructuredAnnotations")
    if known is None and annotations:
        known = ElementTree.Element("StructuredAnnotations")
        # The schema wants it behind the images and before the regions of interest.
        place = max(i for i, child in enumerate(old) if child.tag == "Image")
        old.insert(place + 1, known)
    if known is None:
        return
    spaces = {annotation.get("Namespace") for annotation in annotations}
    stale = [a for a in known if a.get("Namespace") in spaces]
    for annotation in stale:
        known.remove(annotation)
    gone = {annotation.get("ID") for annotation in stale}
    _drop(old, lambda e: e.tag == "AnnotationRef" and e.get("ID") in gone)
    taken = {annotation.get("ID") for annotation in known}
    for annotation in annotations:
        before = annotation.get("ID", "")
        number = 0
        while (name := f"Annotation:{number}") in taken:
            number += 1
        taken.add(name)
        annotation.set("ID", name)
        for reference in new.iter("AnnotationRef"):
            if reference.get("ID") == before:
                reference.set("ID", f"new {name}")
        known.append(annotation)
    for reference in new.iter("AnnotationRef"):
        reference.set("ID", reference.get("ID", "").removeprefix("new "))


def _update_image(old: Element, new: Element) -> None:
    """Give an image the layout, type and voxel size of the one that was written."""
    pixels, written = old.find("Pixels"), new.find("Pixels")
    if pixels is None or written is None:
        return
    before = dict(pixels.attrib)
    for attribute in _LAYOUT[1:]:
        pixels.attrib.pop(attribute, None)
    for attribute, value in written.attrib.items():
        if attribute != "ID":
            pixels.set(attribute, value)
    if before.get("Type") != pixels.get("Type"):
        pixels.attrib.pop("SignificantBits", None)
    same_planes = all(before.get(f"Size{a}") == pixels.get(f"Size{a}") for a in "ZCT")
    channels = _channels(pixels, written)
    planes = pixels.findall("Plane") if same_planes else []
    for child in list(pixels):
        pixels.remove(child)
    pixels.extend([*channels, *written.findall("TiffData"), *planes])
    old.extend(copy.deepcopy(new.findall("AnnotationRef")))


def _channels(pixels: Element, written: Element) -> list[Element]:
    """The channels of the source where there are as many, else those that were written."""
    known, made = pixels.findall("Channel"), written.findall("Channel")
    if len(known) != len(made):
        return made
    for channel, new in zip(known, made, strict=True):
        channel.set("SamplesPerPixel", new.get("SamplesPerPixel", "1"))
        if name := new.get("Name"):
            channel.set("Name", name)
    return known
