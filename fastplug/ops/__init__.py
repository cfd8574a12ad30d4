"""The operations: tensors in, tensors out. Nothing here knows modules, transformers or PEFT.

Each op is a folder of four layers: ``reference.py`` says in plain PyTorch what is computed (and is the CPU path and
the test oracle), ``kernel.py`` holds the Triton kernels and their launchers, ``autograd.py`` the saved tensors and
the backward. ``reference`` and ``kernel`` offer the same functions, so either can stand in an :class:`OpTable`.
"""
