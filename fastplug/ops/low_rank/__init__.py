"""Adding a product of low rank, an adapter's share, to a tensor in place."""
