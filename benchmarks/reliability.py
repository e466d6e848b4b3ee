"""What is tested of files, batches, numbers and names that go wrong: how many tests of each kind.

Run ``python -m benchmarks.reliability``: it collects the tests (and runs none), and prints the
table of docs/reliability.md.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks._common import print_table

KINDS = {
    "TIFF: series, tags, words, damage": "tests/files/test_tiff_*.py",
    "DICOM: folders, values, damage": "tests/files/test_dicom_*.py",
    "NIfTI: types, checksums, claims": "tests/files/test_nifti_*.py",
    "MRC: flags, stamps, axes": "tests/files/test_mrc_*.py",
    "OME-Zarr: chunks, images, fill values": "tests/files/test_zarr_*.py",
    "other quantities in DICOM and NIfTI": "tests/files/test_other_quantities.py",
    "pipes, devices, sizes that can't be true": "tests/files/test_read_refuses.py "
    "tests/files/test_honest.py",
    "readers fed with random damage": "tests/files/test_fuzz_readers.py",
    "lazy planes": "tests/files/test_lazy_planes.py",
    "what may be replaced, and how it is written": "tests/core/test_atomic.py "
    "tests/test_replacing.py",
    "batches: names, losses, changes, records, clusters": "tests/jobs/test_batch_faults.py",
    "pixels that are no intensities": "tests/core/test_missing.py "
    "tests/jobs/test_missing_pixels.py",
    "numbers near the ends of their range": "tests/jobs/test_numbers.py",
    "type of the result": "tests/jobs/test_result_type.py",
    "arguments of a wrong kind": "tests/test_api_arguments.py",
    "damaged model files": "tests/core/test_damaged_model_files.py",
    "layers changed in place": "tests/widgets/test_changed_in_place.py",
    "limits in the forms": "tests/widgets/test_limits.py",
    "names and texts of strangers": "tests/core/test_text.py "
    "tests/widgets/test_text_of_strangers.py",
    "what the shell says": "tests/test_cli_words.py",
}
"""Situations, and the files of their tests."""

ROOT = Path(__file__).parents[1]


def collected(patterns: Sequence[str]) -> int:
    """Number of tests in some files.

    Raises
    ------
    FileNotFoundError
        if a pattern stands for no file.
    """
    files = []
    for pattern in patterns:
        found = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))
        if not found:
            raise FileNotFoundError(pattern)
        files += found
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sum("::" in line for line in listed.splitlines())


def main() -> int:
    rows = [[kind, str(collected(files.split())), f"`{files}`"] for kind, files in KINDS.items()]
    print("# Tests of what goes wrong\n")
    print_table(["situation", "tests", "files"], rows)
    print(f"{sum(int(row[1]) for row in rows)} tests in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
