"""Weights in 8 and 4 bits: their arithmetic (quantise.py) and their layers (linear.py)."""
