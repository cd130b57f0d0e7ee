"""Comparisons of configs: sweeps of runs that are trained for one budget and measured alike."""
