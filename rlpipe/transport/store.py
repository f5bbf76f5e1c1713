"""Weights by Ray's object store: works everywhere, and keeps a version for workers that start later."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlpipe.cluster import wait
from rlpipe.errors import ClusterError
from rlpipe.models.weights import Layout

warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # the store's memory, which is only read


@dataclass(frozen=True, slots=True)
class Stored:
    """buckets: references to uint8 arrays [n], which need not be there yet, or the arrays; digests: of the buckets."""

    buckets: tuple[Any, ...] = ()
    digests: tuple[int, ...] = ()
    timeout_s: float = 600.0  # for one bucket

    def receive(self, layout: Layout, what: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(digest, bucket uint8 [n] on the host) one by one; a bucket is valid until the next is asked for. Raises
        ClusterError when one does not come, or is lost with its node or with whoever put it."""
        for number, (bucket, expected) in enumerate(zip(self.buckets, self.digests, strict=True)):
            if not isinstance(bucket, np.ndarray):
                bucket = self._fetch(bucket, f"{what}, bucket {number + 1}/{len(self.buckets)}")
            yield expected, torch.from_numpy(bucket)

    def _fetch(self, reference: Any, what: str) -> np.ndarray:
        import ray

        try:
            return wait([reference], what=what, timeout_s=self.timeout_s)[0]
        except ray.exceptions.RayError as error:
            raise ClusterError(f"{what} is not in the object store any more: {error}") from error
