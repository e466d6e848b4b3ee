"""Which result of a batch goes where, so that none is ever in another's way or an input's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from napari_learned_diffusion.core.atomic import real
from napari_learned_diffusion.core.errors import FileWriteError
from napari_learned_diffusion.files import FORMATS
from napari_learned_diffusion.files.formats import Format
from napari_learned_diffusion.files.volume import bare_name
from napari_learned_diffusion.jobs.batch_manifest import JOURNAL, MANIFEST
from napari_learned_diffusion.jobs.batch_sources import Source
from napari_learned_diffusion.jobs.batch_state import LOG


class Targets:
    """Where the results of a batch's inputs go; made before anything is begun.

    Parameters
    ----------
    sources
        The inputs.
    out
        The output folder.
    format
        Key of the format of all results; ``None``: each its own.
    alike
        Makes one of names that the folder's disk doesn't tell apart.
    """

    def __init__(
        self, sources: Sequence[Source], out: Path, format: str | None, alike: Callable[[str], str]
    ) -> None:
        self._sources, self._out, self._alike = sources, out, alike
        self._inputs = {real(path) for source in sources for path in source.reads_from()}
        self._above_inputs = {parent for path in self._inputs for parent in path.parents}
        self._claims: defaultdict[str, list[int]] = defaultdict(list)
        self.clashes: dict[int, str] = {}
        """Numbers of the inputs that can't be denoised together with others, and why."""
        self._claim_all(FORMATS[format] if format is not None else None)
        self._find_clashes()

    def path(self, source: Source, own: Format | None, wanted: Format | None) -> Path:
        """The result of an input of one format that is to be of another.

        Raises
        ------
        FileWriteError
            if it would lie outside the output folder, or be one of the batch's own files.
        """
        name = PurePosixPath(source.name)
        if name.is_absolute() or ".." in name.parts or not name.name:
            raise FileWriteError(f"{source.name!r} is no name for a file below {self._out}.")
        target = self._out / source.name
        if own is not None and wanted is not None and wanted is not own:
            target = target.with_name(bare_name(target, own.suffixes) + wanted.suffix)
        if self._key(target) in {self._alike(own_file) for own_file in (MANIFEST, JOURNAL, LOG)}:
            raise FileWriteError(
                f"The result of {source.path} would be called {target.name} as a file of the batch "
                "itself is. Rename the input."
            )
        return target

    def claim(self, number: int, target: Path) -> None:
        """Keep a path for an input whose format has turned out to be another than its name's.

        Raises
        ------
        FileWriteError
            if another input's result goes there.
        """
        key = self._key(target)
        for other in self._at(key):
            if other != number:
                raise FileWriteError(self._clash(number, other, target))
        self._claims[key].append(number)

    def is_claimed(self, path: Path) -> bool:
        """Whether a result goes to a path."""
        return self._key(path) in self._claims

    def check_no_input(self, source: Source, target: Path) -> None:
        """Refuse to write over an input, its own or another's.

        Raises
        ------
        FileWriteError
            if one of them is the target, in it, or around it.
        """
        if self._is_its_own(source, target):
            raise FileWriteError(
                f"{target} would be written over its input. Choose another output folder."
            )
        place = real(target)
        around = (place, *place.parents)
        if place in self._above_inputs or not self._inputs.isdisjoint(around):
            raise FileWriteError(
                f"The result of {source.path} would be written over another input, {target}. "
                "Choose another output folder."
            )

    # --- before anything is begun -----------------------------------------------------------------

    def _claim_all(self, wanted: Format | None) -> None:
        for number, source in enumerate(self._sources):
            # What is wrong with the input or the name by itself is told when its turn comes.
            with suppress(FileWriteError, OSError):
                own = source.format if wanted is not None else None
                target = self.path(source, own, wanted)
                if not self._is_its_own(source, target):
                    self._claims[self._key(target)].append(number)

    def _find_clashes(self) -> None:
        for key, numbers in self._claims.items():
            for number in numbers:
                other = next((n for n in self._at(key) if n != number), None)
                if other is not None:
                    target = self._out / key
                    self.clashes.setdefault(number, self._clash(number, other, target))
                    self.clashes.setdefault(other, self._clash(other, number, target))

    def _at(self, key: str) -> Iterator[int]:
        """The inputs whose results go to a place or to a folder that it is in."""
        for place in (key, *map(str, PurePosixPath(key).parents)):
            yield from self._claims.get(place, ())

    def _clash(self, number: int, other: int, target: Path) -> str:
        one, two = (self._sources[n].path for n in sorted((number, other)))
        return (
            f"{one} and {two} would both be written to {target}. Give each an output folder of its "
            "own, or give the folder above them, below which results keep the places of their "
            "inputs."
        )

    def _is_its_own(self, source: Source, target: Path) -> bool:
        place = real(target)
        return any(
            place == path or place in path.parents or path in place.parents
            for path in map(real, source.reads_from())
        )

    def _key(self, path: Path) -> str:
        return self._alike(path.relative_to(self._out).as_posix())
