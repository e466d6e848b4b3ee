"""Where to compute, and how much memory there is."""

from __future__ import annotations

import psutil
import torch

from napari_learned_diffusion.core.errors import DeviceError

_BUDGET_SHARE = 0.5
"""Part of the free memory that a job takes at most: other programs live on the machine too."""

_ENOUGH = 1_200_000_000
"""Bytes beyond which a CPU gains nothing from larger tiles."""


def available_devices() -> list[str]:
    """Devices that are there, the fastest first; always ends with ``"cpu"``."""
    devices = []
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [*devices, "cpu"]


def resolve_device(name: str, precision: str = "float32") -> torch.device:
    """The device that ``name`` means; ``"auto"`` is the fastest that can do ``precision``.

    Raises
    ------
    DeviceError
        if the device isn't there, or can't compute in ``precision``.
    """
    there = available_devices()
    if name == "auto":
        able = [d for d in there if not (d == "mps" and precision == "float64")]
        return torch.device(able[0])
    kind = name.split(":")[0]
    if kind not in there:
        raise DeviceError(
            f"The device {name!r} isn't there. Choose one of: auto, {', '.join(there)}."
        )
    if kind == "mps" and precision == "float64":
        raise DeviceError("Apple GPUs have no float64. Choose float32, or the device cpu.")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"The device {name!r} can't be used: {error}") from error
    return device


def device_name(device: torch.device) -> str:
    """Name for people: the model of a GPU, or how many threads the CPU computes with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def memory_budget(device: torch.device) -> int:
    """Bytes that a job may use on the device, from what is free there now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _BUDGET_SHARE)
    return min(_ENOUGH, int(psutil.virtual_memory().available * _BUDGET_SHARE))


def release_memory(device: torch.device) -> None:
    """Give back what the GPU's allocator keeps in reserve."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU allocator and MPS raise a plain RuntimeError.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )
