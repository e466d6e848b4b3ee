"""Models of the user's own: fine-tuned ones, each a file in the user's data folder.

A model ``NAME`` is the file ``NAME.safetensors`` with its card in the header, and goes by the key
``my/NAME`` wherever a model is chosen. A file from elsewhere is checked before anything is made of
it: its format, its card, the names and shapes of its tensors, and that all numbers are finite.
Nothing is ever unpickled. Listing the models reads the headers alone and imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_data_path

from napari_learned_diffusion.core.atomic import copy_file
from napari_learned_diffusion.core.diffusivity import learned_diffusivity_class
from napari_learned_diffusion.core.errors import (
    FileFormatError,
    FileWriteError,
    InvalidSettingError,
    UnknownModelError,
)
from napari_learned_diffusion.core.model_files import FORMAT as FORMAT
from napari_learned_diffusion.core.model_files import read_header
from napari_learned_diffusion.core.text import one_line

if TYPE_CHECKING:
    from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity

PREFIX = "my/"
FOLDER_VARIABLE = "LEARNED_DIFFUSION_MODELS"
"""Environment variable that names another folder."""

SUFFIX = ".safetensors"
LONGEST_NAME = 64
_NAME = re.compile(r"\w[\w .+()-]*")
RESERVED_NAMES = frozenset(
    {"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(10))}
)
"""Which Windows doesn't take as the names of files."""


@dataclass(frozen=True)
class UserModel:
    """A model of the user's own.

    Parameters
    ----------
    name
        Without `PREFIX`.
    base
        Key in the registry of the model that it was made from.
    architecture
        Arguments of that model's class.
    parameters
        Number of learned parameters.
    facts
        How it came about: mode, regions, settings, noise, gain, date, version.
    path
        Its file.
    """

    name: str
    base: str
    architecture: dict[str, int]
    parameters: int
    facts: dict[str, Any]
    path: Path

    @property
    def key(self) -> str:
        """What it is chosen by."""
        return PREFIX + self.name

    @property
    def summary(self) -> str:
        """What it is for, on one line."""
        return one_line(self.facts["summary"])


def is_user_key(key: str) -> bool:
    """Whether a model's key is that of a user's own."""
    return key.startswith(PREFIX)


def models_folder() -> Path:
    """The folder of the user's models, which need not be there yet."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given)
    return user_data_path("napari-learned-diffusion", appauthor=False) / "models"


def list_user_models() -> list[UserModel]:
    """All models of the user's own that are intact, by name."""
    return [found for _, found in _read_all() if isinstance(found, UserModel)]


def damaged_user_models() -> dict[str, str]:
    """What is wrong with the files that aren't, one sentence for each, by their keys."""
    return {
        f"{PREFIX}{name}": f"Damaged, delete or replace it: {found}"
        for name, found in _read_all()
        if isinstance(found, FileFormatError)
    }


def broken_user_models() -> list[str]:
    """The sentences of `damaged_user_models`."""
    return list(damaged_user_models().values())


def model_stamp(key: str) -> tuple[int, int] | None:
    """What changes when a model of the user's own is replaced by another of the same name.

    ``None`` for a model of the package, and for one that isn't there.
    """
    if not is_user_key(key):
        return None
    try:
        status = _path(key.removeprefix(PREFIX)).stat()
    except (OSError, InvalidSettingError):
        return None
    return status.st_mtime_ns, status.st_size


def _read_all() -> Iterator[tuple[str, UserModel | FileFormatError]]:
    """Names and models, or what is wrong with them; nothing in the folder can spoil the others."""
    folder = models_folder()
    try:
        paths = sorted(folder.iterdir(), key=lambda p: p.name.lower())
    except OSError:  # there is none yet, or it can't be read: then there are no models
        return
    for path in paths:
        if not path.name.endswith(SUFFIX) or path.name.startswith("."):
            continue
        name = path.name.removesuffix(SUFFIX)
        try:
            _path(name)
            yield name, read_model_file(path)
        except InvalidSettingError as error:
            yield name, FileFormatError(f"{path} has to be renamed. {error}")
        except FileFormatError as error:
            yield name, error


def user_model(key: str) -> UserModel:
    """The model of a key.

    Raises
    ------
    UnknownModelError
        if there is none; the message lists those that there are.
    FileFormatError
        if its file is damaged.
    """
    name = key.removeprefix(PREFIX)
    path = _path(name)
    if not path.exists():
        own = ", ".join(m.key for m in list_user_models()) or "none yet"
        raise UnknownModelError(f"There is no model {PREFIX}{name}. Your own models: {own}.")
    return read_model_file(path)


def load_user_model(key: str) -> LearnedDiffusivity:
    """The model of a key, on the CPU; raises as `user_model`."""
    return _load(user_model(key))


def save_user_model(
    name: str, model: LearnedDiffusivity, facts: dict[str, Any], *, overwrite: bool = False
) -> UserModel:
    """Save a model under a name; the file is complete or as it was before.

    Parameters
    ----------
    facts
        Its card, plain values that JSON can keep.

    Raises
    ------
    InvalidSettingError
        if the name can't be used or is taken.
    FileWriteError
        if the folder can't be written to.
    """
    from napari_learned_diffusion.core.weights import describe, write_tensors

    path = _free_path(name, overwrite=overwrite)
    _make_folder()
    header = describe(model) | {"card": facts}
    write_tensors(path, model.state_dict(), header, overwrite=overwrite)
    return read_model_file(path)


def check_name(name: str, *, overwrite: bool = False) -> None:
    """Refuse a name that can't be used or is taken, before there is anything to save."""
    _free_path(name, overwrite=overwrite)


def rename_user_model(name: str, new: str) -> UserModel:
    """Give a model another name; raises as `user_model` and `save_user_model`."""
    old = user_model(name)
    path = _free_path(new, overwrite=new.lower() == old.name.lower() and new != old.name)
    try:
        old.path.rename(path)
    except OSError as error:
        raise FileWriteError(f"{old.path} can't be renamed: {error.strerror or error}.") from error
    return read_model_file(path)


def delete_user_model(name: str) -> None:
    """Delete a model; raises as `user_model`, though a damaged file can be deleted."""
    path = _path(name.removeprefix(PREFIX))
    if not os.path.lexists(path):
        user_model(name)  # which says what there is
    try:
        path.unlink()
    except OSError as error:
        raise FileWriteError(f"{path} can't be deleted: {error.strerror or error}.") from error


def export_user_model(name: str, target: Path, *, overwrite: bool = False) -> Path:
    """Copy a model's file to ``target``, a file or a folder.

    Raises
    ------
    FileWriteError
        if the file is there already or can't be written.
    """
    model = user_model(name)
    path = target / model.path.name if target.is_dir() else target
    if path.suffix != SUFFIX:
        path = path.with_name(path.name + SUFFIX)
    copy_file(model.path, path, overwrite=overwrite)
    return path


def import_user_model(
    source: Path, name: str | None = None, *, overwrite: bool = False
) -> UserModel:
    """Check a file and copy it among the user's models.

    Parameters
    ----------
    name
        ``None``: the file's name.

    Raises
    ------
    FileFormatError
        if it isn't a model that can be trusted to work; nothing has been copied then.
    InvalidSettingError
        if the name can't be used or is taken.
    FileWriteError
        if the folder can't be written to.
    """
    found = read_model_file(source)
    _load(found)
    path = _free_path(name or source.stem, overwrite=overwrite)
    _make_folder()
    copy_file(source, path, overwrite=overwrite)
    return read_model_file(path)


# --- files ----------------------------------------------------------------------------------------


def _path(name: str) -> Path:
    is_good = (
        len(name) <= LONGEST_NAME
        and _NAME.fullmatch(name) is not None
        and name[-1] not in " ."
        and name.split(".")[0].lower() not in RESERVED_NAMES
    )
    if not is_good:
        raise InvalidSettingError(
            f"A model can't be called {name!r}. Take up to {LONGEST_NAME} letters, digits, spaces, "
            "and any of _ - + . ( ), with a letter or digit first."
        )
    return models_folder() / f"{name}{SUFFIX}"


def _free_path(name: str, *, overwrite: bool) -> Path:
    path = _path(name)
    if os.path.lexists(path) and not overwrite:
        raise InvalidSettingError(
            f"There is a model {PREFIX}{name} already. Choose another name, or delete it first."
        )
    return path


def _make_folder() -> None:
    folder = models_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileWriteError(
            f"The folder {folder} for your models can't be made: {error.strerror or error}."
        ) from error


def read_model_file(path: Path) -> UserModel:
    """What a file says about its model, checked; the tensors aren't read.

    Raises
    ------
    FileFormatError
        as `model_files.read_header`.
    """
    header = read_header(path)
    return UserModel(
        path.name.removesuffix(SUFFIX),
        header.base,
        header.architecture,
        header.parameters,
        header.facts,
        path,
    )


def _load(found: UserModel) -> LearnedDiffusivity:
    """The model of a file whose header has been checked."""
    import torch

    from napari_learned_diffusion.core.weights import fill, read_tensors

    path = found.path
    try:
        model_class = learned_diffusivity_class(found.base)
        # Without memory for them: what it takes is known only when the file turns out to fit.
        with torch.device("meta"):
            shapes = model_class(**found.architecture).state_dict()
    except Exception as error:  # whatever a stranger's numbers lead to
        raise FileFormatError(f"{path} is of an architecture that can't be made.") from error
    tensors, _ = read_tensors(path)
    expected = {name: tuple(t.shape) for name, t in shapes.items()}
    if {name: tuple(t.shape) for name, t in tensors.items()} != expected:
        raise FileFormatError(f"{path} doesn't hold the parameters of the model {found.base}.")
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise FileFormatError(f"{path} holds parameters that aren't finite numbers.")
    model = model_class(**found.architecture)
    fill(path, model, tensors)
    return model
