"""Diffusion language models: stock transformers classes plus a `DiffusionSpec`."""
