"""Latents that were encoded before training: how they are made, and how they lie on disk."""
