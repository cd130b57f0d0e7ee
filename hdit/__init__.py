"""Train and sample image diffusion transformers from scratch."""

__version__ = "0.1.0"
