"""What the gradient of a group's output is multiplied with, in one read of it: B and x Aᵀ of the group's adapters.

One by one, these are a product for s · g B and one for the gradient of each B, and each of them reads g.
"""
