"""Meshwright: find, price, prove and run the split of a large language model over a cluster."""

__version__ = "0.1.0"
