"""Measured figures: quality, speed, real noise. Run from the repository's root, see README.md."""
