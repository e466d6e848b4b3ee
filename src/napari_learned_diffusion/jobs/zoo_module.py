"""A whole denoising as one torch module, for programs that know nothing of diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from napari_learned_diffusion.config import DiffusionConfig
from napari_learned_diffusion.core.diffusivity import learned_diffusivity_class
from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.diffusivity.k_automation import KAutomation
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.core.missing import missing_pixels
from napari_learned_diffusion.core.noise import NoiseModel, noise_model_from_dict
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import solve
from napari_learned_diffusion.jobs.planes import SolverUnits


class DenoisingModule(nn.Module):
    r"""From noisy planes to denoised ones, with a learned diffusivity and fixed settings.

    .. math:: u^{(n+1)} = u^{(n)} + \tau \operatorname{div}(g \nabla u^{(n)}), \qquad
              g = \mathrm{limit}(\mathrm{diffusivity}(\mathrm{stabilise}(u^{(n)})))

    It runs the package's own solver, so it gives what `denoise` gives with the same model, noise
    model, iterations and time step, and keeps what that keeps: the mean, and the range of each
    plane. All arguments are plain values, and all parameters come with ``load_state_dict``; until
    then they are random. It is for inference only: no gradients are recorded.

    Parameters
    ----------
    model
        Key in the registry of a diffusivity that learns.
    noise
        The noise model in the unit of the planes, as `NoiseModel.to_dict` writes it, such as
        ``{"key": "gaussian", "noise_sigma": 10.0}``.
    iterations
        Number of diffusion steps, at least 1. ``None``, of ``k-automation`` only: its network
        chooses for each plane.
    tau
        Their length in squared pixels, above 0. ``None`` as of ``iterations``.
    architecture
        Arguments of the diffusivity's class; ``None``: its defaults.
    fine_tuned
        Whether the parameters are a user's own and not the package's: the network of
        ``k-automation`` then has its way on every plane.

    Raises
    ------
    LearnedDiffusionError
        if there is no such model, or a setting is missing or out of its range.

    Examples
    --------
    >>> import torch
    >>> module = DenoisingModule(
    ...     "foe-splines", {"key": "gaussian", "noise_sigma": 10.0}, iterations=8, tau=0.25
    ... )
    >>> module(torch.randn(2, 1, 32, 48)).shape
    torch.Size([2, 1, 32, 48])
    """

    def __init__(
        self,
        model: str,
        noise: Mapping[str, Any],
        iterations: int | None = None,
        tau: float | None = None,
        architecture: Mapping[str, int] | None = None,
        *,
        fine_tuned: bool = False,
    ) -> None:
        super().__init__()
        model_class = learned_diffusivity_class(model)
        if not issubclass(model_class, KAutomation) and (iterations is None or tau is None):
            raise InvalidSettingError(
                f"{model} chooses nothing by itself: give iterations and the time step tau."
            )
        DiffusionConfig(iterations=iterations, tau=tau)  # which refuses what is out of its range
        if iterations == 0:
            raise InvalidSettingError("Without iterations nothing happens: give at least 1.")
        self.noise: NoiseModel = noise_model_from_dict(dict(noise))
        self.iterations = iterations
        self.tau = tau
        self.fine_tuned = fine_tuned
        self.diffusivity: LearnedDiffusivity = model_class(**(architecture or {}))
        most = self.diffusivity.most_iterations
        if most is not None and iterations is not None and iterations > most:
            raise InvalidSettingError(
                f"{model} was made for at most {most} iterations, not {iterations}. Take fewer."
            )
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay as it is: a diffusivity that is in training may look at less of the plane."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, planes: Tensor) -> Tensor:
        """Denoise each plane by itself.

        Parameters
        ----------
        planes
            ``(b, 1, h, w)``, in any unit, that of the noise model. Pixels that hold no intensity
            (`core.missing`) take no part and come back as they were.

        Returns
        -------
        ``(b, 1, h, w)``, of the same type.

        Raises
        ------
        InvalidImageError
            if they have another shape.
        """
        if planes.ndim != 4 or planes.shape[1] != 1 or 0 in planes.shape:
            raise InvalidImageError(
                f"Planes must have the shape (b, 1, h, w), none of them 0, not "
                f"{tuple(planes.shape)}. Give each channel by itself."
            )
        denoised = [self._denoise(plane.cpu().numpy(), planes.device) for plane in planes[:, 0]]
        return torch.from_numpy(np.stack(denoised)[:, None]).to(planes.device)

    def _denoise(self, plane: NDArray[Any], device: torch.device) -> NDArray[Any]:
        valid = ~missing_pixels(plane, noise=self.noise).mask
        if not valid.any():
            return plane
        units = SolverUnits.of(plane, valid)
        diffusivity, iterations, scheme = self._set_up(plane, valid)
        noisy = units.encode(plane, valid, "float32")
        solution = solve(
            _batch(noisy, device),
            diffusivity,
            noise=units.noise(self.noise),
            scheme=scheme,
            iterations=iterations,
            valid=None if valid.all() else _batch(valid, device).float(),
        )
        result = solution.u[0, 0].cpu().numpy()
        denoised = units.to_dtype(units.decode(result), scheme.keeps_range)
        unchanged = ~valid | (result == noisy)
        denoised[unchanged] = plane[unchanged]
        return denoised

    def _set_up(
        self, plane: NDArray[Any], valid: NDArray[np.bool_]
    ) -> tuple[LearnedDiffusivity, int, Explicit]:
        """Diffusivity, iterations and scheme of a plane; most models choose nothing of it."""
        iterations, tau = self.iterations, self.tau
        diffusivity = self.diffusivity
        if isinstance(diffusivity, KAutomation):
            v = self.noise.stabilise(np.where(valid, plane, np.nan).astype(np.float64))
            chosen = diffusivity.settings_for(v[None], always=self.fine_tuned)
            assert chosen.contrast is not None
            assert chosen.presmooth_sigma is not None
            diffusivity = copy(diffusivity)
            diffusivity.contrast = chosen.contrast
            diffusivity.presmooth_sigma = chosen.presmooth_sigma
            tau = chosen.tau if tau is None else tau
            if iterations is None:
                iterations = max(1, round(chosen.stopping_time / tau))
        assert iterations is not None
        assert tau is not None
        return diffusivity, iterations, Explicit(tau)


def _batch(plane: NDArray[Any], device: torch.device) -> Tensor:
    """``(h, w)`` to ``(1, 1, h, w)``."""
    return torch.from_numpy(np.ascontiguousarray(plane)).to(device)[None, None]
