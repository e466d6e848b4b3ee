"""What has parameters that are trained and kept in a weights file."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Trainable(nn.Module):
    """A module that a weights file can make again.

    Parameters
    ----------
    architecture
        The arguments that the subclass was made with; its weights file repeats them, so that the
        same module can be made again.
    """

    key: ClassVar[str]
    stored_in_half: ClassVar[bool] = False
    """Whether the weights file holds 16 bits of each parameter: half the size, for large models."""
    outer_layers: ClassVar[tuple[str, ...]] = ()
    """Parts of the names of the kernels at either end, which Muon isn't made for."""

    def __init__(self, **architecture: Any) -> None:
        super().__init__()
        self.architecture = architecture
