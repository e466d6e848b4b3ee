"""Several processes on one training, as ``torchrun`` starts them.

``torchrun`` runs the same command in every process and tells each its *rank*, from 0. Without it
there is one process, of rank 0, and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from napari_learned_diffusion.core.device import resolve_device
from napari_learned_diffusion.core.errors import DeviceError


@contextmanager
def processes(device: str) -> Iterator[None]:
    """Be one of the processes that ``torchrun`` started, if it did, while the context lasts.

    Parameters
    ----------
    device
        Where they will compute. On GPUs each process takes one of its own.

    Raises
    ------
    DeviceError
        if there are more processes than GPUs, or if this PyTorch can't connect processes.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    if not distributed.is_available():
        raise DeviceError("This build of PyTorch can't connect processes. Start one without it.")
    on_gpus = resolve_device(device).type == "cuda"
    if on_gpus:
        there, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
        if wanted > there:
            raise DeviceError(f"{wanted} processes need as many GPUs, and there are {there}.")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank_and_number() -> tuple[int, int]:
    """Which process this is, from 0, and how many there are."""
    if not _connected():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def mean_over_processes(value: Tensor) -> float:
    """The mean of a scalar that each process has."""
    if _connected():
        value = value.clone()
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return float(value)


def _connected() -> bool:
    return distributed.is_available() and distributed.is_initialized()
