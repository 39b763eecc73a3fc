"""Clustering of weights into codebooks and of neurons into similar rows."""

from jlcm.clustering.neurons import order_rows
from jlcm.clustering.scalar import METHODS, assign, cluster

__all__ = ["METHODS", "assign", "cluster", "order_rows"]
