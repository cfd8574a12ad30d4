"""Linear projections with LoRA adapters, fused by what they read and write.

For one projection, y = x Wᵀ + bias + s · dropout(x) Aᵀ Bᵀ (Hu et al. 2021). With g the gradient of y and G = s · g B:

    dx = g W + G A        dA = Gᵀ dropout(x)        dB = gᵀ (s · x Aᵀ)

Three things are fused. Projections of one tensor share one skinny product with their stacked A and, when their
weights are decoded, one big product. The rank-r update is not an addition after the big product but the value that
product starts from (the GEMM's beta = 1), which also rounds once less. And a block saves what its neighbours save
anyway: the residual stream, q, k, v and gate/up; norms and activations are computed again in the backward. The big
products stay cuBLAS', which runs at the limit of the tensor cores.

``reference.py`` is the formula, ``group.py`` the products of several projections of one tensor, the other modules an
autograd Function each: ``linear.py`` (one projection), ``attention_input.py`` (norm, q/k/v, q/k norm and RoPE),
``gated_mlp.py`` (residual add, norm, gate, up, activation, down, residual add).
"""
