"""Denoise 2D slices by nonlinear diffusion with a learned diffusivity."""
