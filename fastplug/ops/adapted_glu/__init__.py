"""The gated unit with the adapters around it: those of gate and up are added where their products' results are read,
and what the projection that follows needs of the result is taken where it is made.

One by one, these are nine passes over tensors of the MLP's width: the shares of gate and up are written before their
base product adds to them, the unit reads it all, x Aᵀ of down reads the unit's result; in the backward the gradients of
B of gate and up, of A of down and g B of gate and up each read what the unit has just written. Here it is one pass each
way. ``reference.py`` is the formula, ``kernel.py`` says where it runs; ``hopper_forward.py``, ``hopper_backward.py``
and ``tiles.py`` are the kernels.
"""
