"""What the forms begin with: napari's preferences, and what was set earlier in the session."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from napari.settings import get_plugin_settings

from napari_learned_diffusion.config import DEFAULT_MODEL, Device
from napari_learned_diffusion.widgets._form import FormValues
from napari_learned_diffusion.widgets._lazy_stack import CACHE_BYTES

PLUGIN = "napari-learned-diffusion"

_MIB = 1 << 20


@dataclass(frozen=True)
class Preferences:
    """The page of this plugin in **File ▸ Preferences**; in the manifest, under ``configurations``.

    Parameters
    ----------
    model, device, tile, memory_budget
        As in `FormValues`.
    cache
        Bytes that slices may take which are denoised as the user scrolls.
    live_preview
        Whether the live preview is on from the beginning.
    """

    model: str = DEFAULT_MODEL
    device: Device = "auto"
    tile: int | None = None
    memory_budget: int | None = None
    cache: int = CACHE_BYTES
    live_preview: bool = False

    @classmethod
    def read(cls) -> Preferences:
        """What the user has chosen; the defaults where napari doesn't know the plugin."""
        try:
            chosen = get_plugin_settings(PLUGIN).denoising  # type: ignore[attr-defined]
        except KeyError:
            return cls()
        return cls(
            model=chosen.model,
            device=chosen.device,
            tile=chosen.tile or None,
            memory_budget=chosen.memory * _MIB or None,
            cache=chosen.cache * _MIB,
            live_preview=chosen.live_preview,
        )


@dataclass(frozen=True)
class Session:
    """What a form held when it was closed.

    Parameters
    ----------
    preferences
        Those that held then.
    values
        The form.
    live_preview
        Whether the preview was on.
    stack_way
        Whether stacks were denoised now or as the user scrolls.
    advanced
        Whether the advanced settings were in sight.
    """

    preferences: Preferences
    values: FormValues
    live_preview: bool = False
    stack_way: str = "now"
    advanced: bool = False


def opening(earlier: Session | None) -> Session:
    """What a form begins with: as it was closed, but preferences that were changed since win."""
    now = Preferences.read()
    if earlier is None:
        earlier = Session(Preferences(), FormValues())
    changed = {
        field.name: getattr(now, field.name)
        for field in fields(Preferences)
        if getattr(now, field.name) != getattr(earlier.preferences, field.name)
    }
    live_preview = changed.pop("live_preview", earlier.live_preview)
    changed.pop("cache", None)
    values = replace(earlier.values, **changed)
    return replace(earlier, preferences=now, values=values, live_preview=live_preview)
