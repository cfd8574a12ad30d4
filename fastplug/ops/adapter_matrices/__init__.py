"""A and B of the adapters of several projections as the products take them: stacked, block-diagonal, and cast."""
