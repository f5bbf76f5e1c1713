"""Samplers as small pure functions on [slots, B] tensors, and the engine that runs them."""
