"""Fine-tunes language models through a Kronecker-product SVD of their weights."""

__version__ = "0.2.0"
