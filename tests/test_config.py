"""Settings refuse what makes no sense, and know what was changed."""

from __future__ import annotations

import pytest

from napari_learned_diffusion.config import (
    MAX_ITERATIONS,
    DiffusionConfig,
    Gaussian,
    MapsConfig,
    TilingConfig,
    noise_from_arguments,
)
from napari_learned_diffusion.core.errors import InvalidSettingError


@pytest.mark.parametrize(
    "bad",
    [
        {"iterations": -1},
        {"iterations": MAX_ITERATIONS + 1},
        {"iterations": 2.5},
        {"iterations": True},
        {"contrast": 0},
        {"contrast": float("nan")},
        {"tau": -0.1},
        {"tau": float("inf")},
        {"stopping_time": 0},
        {"presmooth_sigma": -1},
        {"presmooth_sigma": 51},
        {"function": "cubic"},
        {"scheme": "implicit"},
        {"precision": "float16"},
        {"noise_kind": "speckle"},
        {"noise_scope": "volume"},
    ],
)
def test_settings_out_of_range_are_refused_by_name(bad):
    with pytest.raises(InvalidSettingError) as caught:
        DiffusionConfig(**bad)
    assert str(next(iter(bad.values()))) in str(caught.value)


@pytest.mark.parametrize("bad", [{"tile": 31}, {"memory_budget": 0}])
def test_tiles_out_of_range_are_refused(bad):
    with pytest.raises(InvalidSettingError):
        TilingConfig(**bad)


def test_only_what_was_changed_is_told():
    assert DiffusionConfig().changed() == {}
    config = DiffusionConfig(tau=0.1, noise=Gaussian(3.0))
    assert config.changed() == {"noise": Gaussian(3.0), "tau": 0.1}
    assert config.with_(tau=None, noise=None) == DiffusionConfig()


def test_noise_is_given_once():
    assert noise_from_arguments(None, 3.0) == Gaussian(3.0)
    assert noise_from_arguments(Gaussian(2.0), None) == Gaussian(2.0)
    assert noise_from_arguments(None, None) is None
    with pytest.raises(InvalidSettingError, match="not both"):
        noise_from_arguments(Gaussian(2.0), 3.0)


@pytest.mark.parametrize("step", [0, -1, 1.5, True])
def test_maps_of_no_step_are_refused(step):
    with pytest.raises(InvalidSettingError, match="step of the maps"):
        MapsConfig(step=step)


def test_maps_know_their_names_and_when_they_come_too_late():
    assert MapsConfig().names == ()
    assert MapsConfig(orientation=True).names == ("orientation", "anisotropy")
    assert MapsConfig(diffusivity=True).names == ("diffusivity",)
    assert MapsConfig(diffusivity=True, step=5).is_after(4)
    assert not MapsConfig(diffusivity=True, step=5).is_after(5)
    assert not MapsConfig(diffusivity=True).is_after(0)
    assert not MapsConfig(step=5).is_after(4)
