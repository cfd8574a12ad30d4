"""Scaling the columns or the rows of a matrix: DoRA's magnitudes, forward and backward."""
