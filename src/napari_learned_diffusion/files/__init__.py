"""Image files in and out: pixels together with their axes, voxel size and units.

`read` and `write` turn a file into a `Volume` and back; `get_reader` and `write_image` offer the
same to napari. A format is one entry of ``FORMATS`` in `formats`:

- TIFF: plain and multi-page TIFF, ImageJ hyperstacks (also those over 4 GB with one directory),
  OME-TIFF, BigTIFF, with any compression that imagecodecs knows. Several images of one kind, such
  as positions, are a stack. Written is the flavour that the name promises (``.ome.tif``) or the
  source had, or the first of ImageJ TIFF, OME-TIFF and tifffile's own "shaped" TIFF that can carry
  the volume's type, axes, voxel size and units without loss; BigTIFF where 4 GB don't suffice. What
  the source said in OME-XML or ImageJ's words comes back;
- MRC and CCP4 maps, header, extended header and IMOD's flags kept;
- DICOM series, ordered by position, in rescaled values such as Hounsfield units; written as a
  series derived from the one that was read;
- NIfTI, affine, type and scaling kept;
- OME-Zarr 0.1 to 0.5, place and channels kept, and single zarr arrays; written as 0.5, in several
  resolutions.

Files over `LAZY_ABOVE` bytes of pixels are opened lazily, one dask chunk a plane, and dask arrays
are written plane by plane, so that no whole stack needs to fit into memory.
"""

from napari_learned_diffusion.files._lazy import LAZY_ABOVE
from napari_learned_diffusion.files._napari import get_reader, write_dicom_series, write_image
from napari_learned_diffusion.files._units import PIXEL
from napari_learned_diffusion.files.formats import (
    COMPRESSIONS,
    FORMATS,
    read,
    supported_suffixes,
    write,
)
from napari_learned_diffusion.files.volume import Volume

__all__ = [
    "COMPRESSIONS",
    "FORMATS",
    "LAZY_ABOVE",
    "PIXEL",
    "Volume",
    "get_reader",
    "read",
    "supported_suffixes",
    "write",
    "write_dicom_series",
    "write_image",
]
