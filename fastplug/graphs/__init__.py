"""CUDA graphs for decoder layers whose step is too short to hide the launching of its kernels.

A layer of an 8B model takes a GPU about 2 ms forward and backward at 1,024 tokens, and Python longer than that to
launch its fifty kernels, so the GPU waits. A CUDA graph is those launches recorded once and replayed by one call. One
layer is one pair of graphs (forward, backward): between layers everything stays as it is, hooks of the model, hidden
states, gradient accumulation and all.

What is recorded reads and writes fixed addresses, so a replay is right only while everything else is as it was:

- ``fingerprint.py`` compares the layer (adapters, weights, modes, hooks) before each replay with what was recorded;
  what changed is run eagerly, and recorded again if it then stays the same.
- Inputs are copied into fixed tensors and outputs out of them. Gradients are copied too: autograd may keep the tensor
  it is given as ``.grad``, which the next replay would overwrite.
- The activations of a layer have one place. A second forward before the backward of the first runs eagerly.
- Sequences are padded on the right to a few lengths; causal attention does not look there, and the gradients of the
  padding are zero.

Long steps gain only in FP8. Where such a step keeps its activations, recordings would stand in the way of everything
that runs beside it, so they last while call after call is of one size (``state.Steady``).

``layer_graph.py`` holds one recorded layer, ``replay.py`` decides when to record and to replay, ``recording.py`` does
the former, ``state.py`` has what is remembered from call to call. ``compiling.py`` has a layer's kernels compiled
before the first one runs, with what a recording is warmed up by.
"""
