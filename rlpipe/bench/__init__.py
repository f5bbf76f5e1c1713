"""Benches: the parts of a run against the plain published way, on the same machine, weights and inputs."""
