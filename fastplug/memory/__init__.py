"""Spend exactly the memory there is: what each decoder layer keeps for its backward, and what it computes again.

``policy.py`` names what a layer may keep, ``saved.py`` counts the tensors of each policy, ``checkpoint.py`` runs a
layer under one, ``offload.py`` puts residuals into host memory.
"""
