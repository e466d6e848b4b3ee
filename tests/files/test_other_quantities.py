"""What was removed, and maps, written with the header of a source of whole numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from napari_learned_diffusion.files import Volume, get_reader, read, write, write_image

NAMES = ["a.mrc", "a.nii", "a.nii.gz", "a.tif", "a.ome.tif", "a.ome.zarr"]
TYPES = ["int8", "uint8", "int16", "uint16"]
HELD = [(name, t) for name in NAMES for t in TYPES if (name, t) != ("a.mrc", "uint8")]


@pytest.mark.parametrize(("name", "dtype"), HELD)
def test_their_own_type_is_written_in_every_format(tmp_path: Path, name: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 120, (2, 16, 12)).astype(dtype)
    scale, units = (2.0, 0.5, 0.5), ("nanometer",) * 3
    source = write(tmp_path / name, Volume(data, "ZYX", scale, units, "a"))
    removed = rng.normal(0, 3, data.shape).astype(np.float32)
    volume = read(source)
    found = read(write(tmp_path / f"removed-{name}", replace(volume, data=removed)))
    np.testing.assert_array_equal(found.data, removed)
    assert (found.scale, found.units) == (volume.scale, volume.units)
    reader = get_reader(str(source))
    assert reader is not None
    (_, given, _) = reader(str(source))[0]
    (saved,) = write_image(str(tmp_path / f"layer-{name}"), removed, given | {"name": "removed"})
    np.testing.assert_array_equal(read(saved).data, removed)
