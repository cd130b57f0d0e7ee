"""Images from a trained denoiser, and the files that they become."""
