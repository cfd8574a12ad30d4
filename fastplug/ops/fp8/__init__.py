"""FP8 (e4m3) products with one scale for each row of both operands."""
