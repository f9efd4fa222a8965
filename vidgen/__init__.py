"""vidgen: a JAX/TPU-native trainer for large video generation models."""

__version__ = "0.1.0"
