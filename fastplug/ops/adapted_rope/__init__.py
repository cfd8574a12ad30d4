"""What a layer does with q, k and v before attention, in one pass: their adapters' shares are added, q and k turned.

One by one, the shares are written before the base product adds to them, and RoPE reads and writes q and k once more:
six passes over q, k and v, of which the base product's own is one. Here it is three.
"""
