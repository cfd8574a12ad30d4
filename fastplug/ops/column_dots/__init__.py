"""The dot products of the columns of two matrices: DoRA's gradient of the magnitudes."""
