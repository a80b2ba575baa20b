"""The short name of `preprocess`, which processing/image.py explains."""

from .processing.image import preprocess as preprocess
