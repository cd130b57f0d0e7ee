"""The diffusion core: noise levels, preconditioning, loss weights, guidance and samplers."""
