"""Embeddings and other collections of vectors."""

from fewbits.core.lazy import exported

__getattr__, __dir__ = exported("vectors")
