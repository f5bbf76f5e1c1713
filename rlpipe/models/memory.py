"""What a worker of each role needs in bytes, with the arithmetic shown, and which GPUs have room for it.

Estimates from shapes alone, without torch. Weights, gradients, optimizer and caches are exact up to padding; activations are
counted from what a gated decoder layer keeps for its backward pass, and are right to about a third.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlpipe.model_shapes import Shape

GPUS_GB = (24, 40, 48, 80, 141)  # as sold, powers of ten; a tenth is left to the allocator, kernels and the CUDA context
ROOM = 0.9
HEAD_ROWS = 2048  # of the LM head at a time in the learner
FLOAT = 4


@dataclass(frozen=True, slots=True)
class Part:
    """nbytes of one kind of content. how: the arithmetic · on_host: in the machine's memory instead of the GPU's."""

    name: str
    nbytes: float
    how: str
    on_host: bool = False


def gpu_bytes(parts: list[Part]) -> float:
    return sum(part.nbytes for part in parts if not part.on_host)


def fitting(parts: list[Part]) -> list[int]:
    """The sizes of GPUS_GB that hold all that is not on the host."""
    return [size for size in GPUS_GB if gpu_bytes(parts) <= ROOM * size * 1e9]


def rollout_parts(shape: Shape | None, parameters: int, width: int, *, slots: int, tokens: int, rows: int) -> list[Part]:
    """width: bytes of a weight · slots × tokens: of the cache · rows: masked positions of a step that the LM head sees."""
    parts = [Part("weights", parameters * width, f"{_count(parameters)} × {width} B")]
    if shape is not None:
        each = shape.kv_values * width
        parts.append(Part("KV cache", slots * tokens * each, f"{slots} slots × {tokens} tokens × {each / 1024:.4g} KiB"))
        logits = rows * shape.vocabulary * FLOAT
        parts.append(Part("logits", logits, f"{rows} rows × {shape.vocabulary} × {FLOAT} B"))
    return parts


def learner_parts(
    shape: Shape | None,
    parameters: int,
    width: int,
    *,
    ranks: int,
    stage: int,
    offload: bool,
    token_budget: int,
    checkpointing: bool,
    trainable: int | None = None,
) -> list[Part]:
    """Of one rank under ZeRO `stage`. trainable: parameters with gradients, None for all.

    N weights of b bytes; N·b of gradients; 8 N of Adam moments, 12 N with the float32 master of bfloat16; divided over the
    ranks from ZeRO 3, 2 and 1 on. Offloading moves the optimizer, and at ZeRO 3 the weights, to the host.
    """
    moved = parameters if trainable is None else trainable
    state = 8 if width == FLOAT else 12
    parts = [
        Part("weights", *_share(parameters, width, ranks, stage >= 3), on_host=offload and stage == 3),
        Part("gradients", *_share(moved, width, ranks, stage >= 2)),
        Part("optimizer", *_share(moved, state, ranks, stage >= 1), on_host=offload),
    ]
    if shape is None:
        return parts
    if stage == 3 and ranks > 1:
        layer = _layer(shape) * width
        embedding = shape.vocabulary * shape.width * width
        parts.append(Part("gathered", 2 * layer + embedding, "two layers and an embedding, whole"))
    kept, how = _activations(shape, token_budget, width, checkpointing)
    head = 3 * min(HEAD_ROWS, token_budget) * shape.vocabulary * FLOAT
    return [*parts, Part("activations", kept, how), Part("logits", head, f"3 × {HEAD_ROWS} rows × {shape.vocabulary} × 4 B")]


def adapter_parameters(shape: Shape, rank: int, targets: list[str]) -> int:
    """Of LoRA on dense linear layers, as peft adds them: rank × (inputs + outputs) each."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        "q_proj": shape.width + queries, "k_proj": shape.width + keys, "v_proj": shape.width + keys,
        "o_proj": queries + shape.width, **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), shape.width + shape.mlp),
    }  # fmt: skip
    return shape.layers * rank * sum(sizes.get(target, 0) for target in targets)


def table(role: str, parts: list[Part]) -> str:
    """Lines for a plan: the total, the parts, and where it fits."""
    total, host = gpu_bytes(parts), sum(part.nbytes for part in parts if part.on_host)
    sizes = fitting(parts)
    listed = ", ".join(map(str, GPUS_GB))
    smallest = f"fits GPUs of {sizes[0]} GB and more" if sizes else f"fits none of the GPUs of {listed} GB"
    beside = f" and {size(host)} of host memory" if host else ""
    lines = [f"{role:<10}{size(total):>10}{beside}  {smallest}"]
    lines += [f"  {p.name:<12}{size(p.nbytes):>9}  {p.how}{' (on the host)' if p.on_host else ''}" for p in parts if p.nbytes]
    return "\n".join(lines)


def size(nbytes: float) -> str:
    """GB and MB are powers of ten, as GPUs are sold."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _share(count: int, width: int, ranks: int, divided: bool) -> tuple[float, str]:
    parts = f" / {ranks} ranks" if divided and ranks > 1 else ""
    return count * width / (ranks if divided else 1), f"{_count(count)} × {width} B{parts}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e8 else f"{parameters / 1e6:.2f}M"


def _layer(shape: Shape) -> int:
    """Parameters of the largest layer."""
    experts = 3 * shape.width * shape.expert_mlp * (shape.experts + shape.shared_experts)
    return 2 * shape.width * shape.head_dim * (shape.heads + shape.kv_heads) + max(3 * shape.width * shape.mlp, experts)


def _activations(shape: Shape, tokens: int, width: int, checkpointing: bool) -> tuple[float, str]:
    """A layer keeps its inputs to norms and projections, queries, keys, values, what attention gave, and the MLP's gate, up,
    its product and the activation; norms keep a float32 copy. Checkpointed, all layers but one keep their input alone."""
    mlp = max(shape.mlp if shape.dense_layers or not shape.experts else 0, _active_mlp(shape))
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    layer = tokens * (width * (5 * shape.width + attention + 4 * mlp) + 2 * FLOAT * shape.width)
    if not checkpointing:
        return shape.layers * layer, f"{tokens} tokens × {shape.layers} layers × {layer / tokens / 1024:.4g} KiB"
    kept = shape.layers * tokens * shape.width * width
    return kept + layer, f"{tokens} tokens × ({shape.layers} inputs of {shape.width * width / 1024:.4g} KiB + one layer)"


def _active_mlp(shape: Shape) -> int:
    return shape.expert_mlp * (shape.active_experts + shape.shared_experts)
