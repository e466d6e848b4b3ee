"""What users of napari rely on before the first click: manifest, menus, imports, dependencies."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from npe2 import PluginManifest
from npe2.manifest.utils import import_python_name
from packaging.requirements import Requirement

import napari_learned_diffusion

if TYPE_CHECKING:
    from napari import Viewer
    from qtpy.QtGui import QAction
    from qtpy.QtWidgets import QMenu

NAME = "napari-learned-diffusion"
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(napari_learned_diffusion.__file__).parent
MANIFEST = PluginManifest.from_file(PACKAGE / "napari.yaml")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
QT_BINDINGS = {"PyQt5", "PyQt6", "PySide2", "PySide6"}
GUI_LIBRARIES = {"napari", "qtpy", "magicgui", "superqt", "pyqtgraph", *QT_BINDINGS}


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- manifest ------------------------------------------------------------------------------------


def test_manifest_is_found_through_the_entry_point() -> None:
    assert PluginManifest.from_distribution(NAME).name == MANIFEST.name == NAME


def test_manifest_in_the_root_is_the_packaged_one() -> None:
    link = ROOT / "napari.yaml"
    assert link.is_symlink()
    assert link.resolve() == (PACKAGE / "napari.yaml").resolve()


def test_manifest_imports() -> None:
    MANIFEST.validate_imports()  # as `npe2 validate --imports` does


@pytest.mark.parametrize("command", MANIFEST.contributions.commands, ids=lambda c: c.id)
def test_command_resolves(command: Any) -> None:
    # npe2 stops looking at the first list of contributions, so every command is tried here.
    assert callable(import_python_name(command.python_name))


def test_every_contribution_has_its_command() -> None:
    contributions = MANIFEST.contributions
    commands = {command.id for command in contributions.commands}
    used = {
        item.command
        for items in (
            contributions.widgets,
            contributions.readers,
            contributions.writers,
            contributions.sample_data,
        )
        for item in items
    }
    assert used == commands


# -- what shows in napari ------------------------------------------------------------------------


def entries(menu: QMenu) -> Iterator[tuple[list[str], QAction]]:
    """Visible entries of a menu and its submenus, with the path of titles that leads to each."""
    menu.aboutToShow.emit()  # napari fills its menus when they open
    for action in menu.actions():
        title = action.text().replace("&&", "&")
        if not action.isVisible() or action.isSeparator():
            continue
        if action.menu() is None:
            yield [title], action
        else:
            for path, entry in entries(action.menu()):
                yield [title, *path], entry


WIDGETS = [widget.display_name for widget in MANIFEST.contributions.widgets]


@pytest.mark.parametrize("name", WIDGETS)
def test_layers_menu_opens_the_widget(make_napari_viewer: Callable[..., Viewer], name: str) -> None:
    viewer = make_napari_viewer(show=True)
    found = {
        path[-1]: (path, action)
        for path, action in entries(viewer.window.layers_menu)
        if "Learned diffusion" in path
    }
    title = f"{name} (Learned Diffusion)"
    assert len(found) == len(WIDGETS)
    path, action = found[title]
    assert path == ["Filter", "Learned diffusion", title]
    assert action.isEnabled()
    assert not viewer.window.dock_widgets
    action.trigger()
    assert list(viewer.window.dock_widgets) == [title]


def test_samples_menu_lists_every_sample(make_napari_viewer: Callable[..., Viewer]) -> None:
    viewer = make_napari_viewer(show=True)
    listed = [
        path[-1]
        for path, _ in entries(viewer.window.file_menu)
        if path[:2] == ["Open Sample", "Learned Diffusion"]
    ]
    assert listed == [sample.display_name for sample in MANIFEST.contributions.sample_data]


def test_sample_opens_in_physical_units(make_napari_viewer: Callable[..., Viewer]) -> None:
    viewer = make_napari_viewer()
    (layer,) = viewer.open_sample(NAME, "fluorescence")
    assert [str(unit) for unit in layer.units] == ["micrometer"] * 3
    assert viewer.dims.axis_labels == ("z", "y", "x")


# -- imports -------------------------------------------------------------------------------------


def test_import_is_light() -> None:
    heavy = {"torch", "numba", *GUI_LIBRARIES}
    code = f"import sys, {PACKAGE.name}; print(sorted({heavy!r} & set(sys.modules)))"
    assert run_python(code) == "[]"


@pytest.mark.parametrize("layer", ["core", "files", "jobs"])
def test_layer_imports_no_gui(layer: str) -> None:
    """Every module of it imports where no GUI library exists, and no torchvision either."""
    forbidden = {"torchvision", *GUI_LIBRARIES}
    code = f"""
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {forbidden!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
package = importlib.import_module("{PACKAGE.name}.{layer}")
modules = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in modules:
    importlib.import_module(name)
print(len(modules))
"""
    assert int(run_python(code)) > 0


@pytest.mark.parametrize(
    "source", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_qt_only_through_qtpy(source: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.partition(".")[0])
    assert not imported & (QT_BINDINGS | {"torchvision"})


# -- metadata ------------------------------------------------------------------------------------


def test_base_dependencies_leave_the_choice_of_qt_to_the_user() -> None:
    requirements = [Requirement(text) for text in PROJECT["dependencies"]]
    names = {requirement.name.lower() for requirement in requirements}
    assert not names & {binding.lower() for binding in QT_BINDINGS}
    (napari,) = (r for r in requirements if r.name == "napari")
    assert not napari.extras
    everything = {
        r.name: r.extras for r in map(Requirement, PROJECT["optional-dependencies"]["all"])
    }
    assert everything == {"napari": {"pyqt6"}, NAME: {"cluster", "dicom", "mrc", "nifti"}}


def test_dependencies_have_lower_bounds_and_no_caps() -> None:
    for text in PROJECT["dependencies"]:
        operators = {specifier.operator for specifier in Requirement(text).specifier}
        assert operators == {">="}, text


def test_version_is_the_one_of_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    # The first version that is named: the newest released one, or what the unreleased one will be.
    newest = re.search(r"^(?:## \[?|What will be )(\d+\.\d+\.\d+)\b", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"] == napari_learned_diffusion.__version__


def test_installed_metadata() -> None:
    metadata = importlib.metadata.metadata(NAME)
    assert "Framework :: napari" in metadata.get_all("Classifier")
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Version"] == PROJECT["version"]
