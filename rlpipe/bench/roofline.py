"""The physical floor of a rollout: what the hardware would need for the work that was done.

FLOP = rows · (2 · P_body + 4 · layers · heads · head_dim · S) + 2 · head_rows · d · V
bytes = forwards · weights + slot_steps · S · (bytes of keys and values of a position)

S is the mean number of keys. The floor is the larger of the two times, so computing and reading overlap perfectly.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlpipe.models.policy import DiffusionLM

H200_TFLOPS, H200_TBS = 790.0, 4.8  # bfloat16 as measured, and memory bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """flop, bytes: of the whole run · compute_s, memory_s: the time that the hardware needs for each."""

    flop: float
    bytes: float
    compute_s: float
    memory_s: float

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.memory_s)


def roofline(
    model: DiffusionLM, *, forwards: int, rows: int, head_rows: int, slot_steps: int, keys: float, tflops: float, tbs: float
) -> Roofline:
    """keys: mean number of keys a row sees · slot_steps: sequences forwarded, summed over the forwards."""
    config = model.lm.config
    width = next(model.lm.parameters()).element_size()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = config.hidden_size * config.vocab_size
    body = sum(p.numel() for layer in model.lm.model.layers for p in layer.parameters())
    per_row = 2 * body + 4 * config.num_hidden_layers * config.num_attention_heads * head_dim * keys
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * width
    flop = rows * per_row + 2 * head_rows * head
    moved = forwards * (body + head) * width + slot_steps * keys * kv
    return Roofline(flop=flop, bytes=moved, compute_s=flop / (tflops * 1e12), memory_s=moved / (tbs * 1e12))
