"""Fine-tunes language models through a Kronecker-product SVD of their weights."""

__version__ = "0.1.0"
