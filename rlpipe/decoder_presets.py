"""Named decoders: what people publish, as settings of the one sampler.

A preset leaves max_tokens, temperature, top_p and top_k to the recipe and sets everything else. `differs` says where ours and
the reference part. All presets share these differences: noise is one uniform per (seed, position, step) and not Gumbel noise, a
request's result never depends on its batch, ties go to the lowest position, MASK is never drawn, "above" means at least.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from rlpipe.config import DecoderConfig
from rlpipe.errors import ConfigError

OWN_KEYS = ("max_tokens", "temperature", "top_p", "top_k")  # stay the recipe's


@dataclass(frozen=True, slots=True)
class Preset:
    """attention: of the models it is for: any, full or block · source: paper or repository · differs: from the reference."""

    attention: str
    source: str
    differs: str
    settings: dict[str, Any]


def _preset(attention: str, source: str, differs: str = "", **settings: Any) -> Preset:
    return Preset(attention, source, differs, settings)


LLADA, DREAM, SDAR = "LLaDA generate.py", "Dream generation_utils.py", "SDAR generate.py"
FAST, EOSER, MDPO = "Fast-dLLM (arXiv 2505.22618)", "EOSER-ASS-RL (arXiv 2509.23924)", "MDPO (arXiv 2508.13148)"
REMDM, DKV, FREECACHE = "ReMDM (arXiv 2503.00307)", "dKV-Cache", "FreeCache (arXiv 2505.21467)"
OWN_MASKS = "own mask count instead of the batch's mean; steps that would commit nothing are passed over"

_even = {"score": "sampled_prob", "schedule": "even", "stop": "length"}
_dream = {"schedule": "dream", "steps": 512, "confidence": "sampler", "stop": "length"}
_sdar = {"score": "sampled_prob", "confidence": "sampler"}
_fast = {"score": "sampled_prob", "block_size": 32, "select": "threshold", "threshold": 0.9}
_guided = {"score": "left_to_right", "select": "guided", "stop": "eotp"}
_remdm = {"score": "sampled_prob", "schedule": "dream", "steps": 128, "edit": "remdm", "stop": "length"}

PRESETS: dict[str, Preset] = {
    "llada_low_confidence": _preset("full", LLADA, "stops forwarding a full block", block_size=32, steps=32, **_even),
    "llada_random": _preset(
        "full", LLADA, "stops forwarding a full block", block_size=32, steps=32, **_even | {"score": "random"}
    ),
    "dream_origin": _preset("full", DREAM, "", select="bernoulli", **_dream),
    "dream_maskgit_plus": _preset("full", DREAM, OWN_MASKS, score="sampled_prob", **_dream),
    "dream_topk_margin": _preset("full", DREAM, OWN_MASKS, score="margin", **_dream),
    "dream_entropy": _preset("full", DREAM, OWN_MASKS, score="entropy", **_dream),
    "sdar_sequential": _preset("block", SDAR, "", score="left_to_right"),
    "sdar_static": _preset("block", SDAR, "prompt tokens that open the first block cannot be overwritten", **_sdar),
    "sdar_dynamic": _preset(
        "block", SDAR, "below the threshold the most confident go first, as in SDAR and not the leftmost as in JetEngine",
        select="threshold", threshold=0.85, **_sdar,
    ),
    "sdar_entropy_bounded": _preset(
        "block", SDAR, "the rule as meant, with entropies over the vocabulary; the reference crashes",
        select="entropy_bounded", options={"gamma": 0.6, "keep_largest": True}, **_sdar,
    ),
    "tracerl_dynamic": _preset("block", "dLLM-RL (arXiv 2509.06949)", "", select="threshold", threshold=0.9, **_sdar),
    "fast_dllm_threshold": _preset("full", FAST, "", **_fast),
    "fast_dllm_factor": _preset(
        "full", FAST, "the rule as written; the loop commits one more when the test fails only at the last rank",
        options={"factor": 1.0}, **_fast | {"select": "factor"},
    ),
    "fast_dllm_prefix": _preset("full", FAST, "", cache="prefix", **_fast),
    "fast_dllm_dual": _preset("full", FAST, "no token is committed untested at a block's first step", cache="dual", **_fast),
    "fast_dllm_dual_near": _preset(
        "full", FAST, "ours: only the last and the new block are refreshed", cache="dual", options={"refresh": "near"}, **_fast
    ),
    "dimple_confident": _preset(
        "full", "Dimple", "structure priors are Request.preset", score="sampled_prob", select="threshold", threshold=0.95,
        options={"enough": 1}, **_dream | {"confidence": "model"},
    ),
    "prophet": _preset("full", "Prophet", "see selection.Prophet", block_size=32, steps=32, select="prophet", **_even),
    "local_leap": _preset("any", "LocalLeap (arXiv 2510.07081)", score="sampled_prob", select="local_leap"),
    "credit": _preset("any", "CreditDecoding", score="sampled_prob", select="threshold", threshold=0.9, fuse="credit"),
    "klass": _preset("any", "KLASS", "", select="stable", **_even | {"schedule": "tokens"}),
    "eb_sampler": _preset(
        "any", "EB-sampler (arXiv 2505.24857)", "per request: d2Cache's form mixes the sequences of a batch",
        score="sampled_prob", select="entropy_bounded", options={"gamma": 0.35},
    ),
    "hierarchical": _preset("any", "dInfer", "without its re-masking variant", score="sampled_prob", select="hierarchical"),
    "bacd": _preset("any", "TDAR", score="sampled_prob", select="block_adaptive"),
    "eoser": _preset("full", EOSER, "the clock counts a block's own steps; all EOS ids", steps=128, eos_gamma=0.4, **_even),
    "ass": _preset("full", EOSER, "one block", **_even | {"schedule": "doubling"}),
    "eoser_ass": _preset("full", EOSER, "one block; all EOS ids count", eos_gamma=0.01, **_even | {"schedule": "doubling"}),
    "rcr": _preset(
        "full", MDPO, "only sampled tokens can be re-masked", block_size=128, steps=32, edit="rcr",
        **_even | {"schedule": "cosine"},
    ),
    "rcr_block": _preset(
        "block", MDPO, "re-masks in the active block only, which keeps the block cache exact", score="sampled_prob",
        schedule="linear", steps=4, edit="rcr", options={"scope": "block"},
    ),
    "wino": _preset("any", "WINO", "only committed tokens get a shadow row", score="sampled_prob", edit="wino"),
    "remdm_cap": _preset("full", REMDM, "time ends at 0; the last step re-masks nothing", **_remdm),
    "remdm_rescale": _preset("full", REMDM, "as remdm_cap", options={"strategy": "rescale"}, **_remdm),
    "remdm_conf": _preset("full", REMDM, "as remdm_cap", options={"strategy": "conf"}, **_remdm),
    "remdm_loop": _preset("full", REMDM, "as remdm_cap", options={"strategy": "loop"}, **_remdm),
    "eotp": _preset("any", "Learn2PD", "the stop rule, with the threshold rule in place of its trained filter",
                    score="sampled_prob", select="threshold", threshold=0.9, stop="eotp"),
    "dkv_decode": _preset("full", DKV, "", steps=128, cache="dkv_decode", options={"every": 8}, **_even),
    "dkv_greedy": _preset(
        "full", DKV, "rows per request, so their counts need not agree", steps=128, cache="dkv_greedy",
        **_even | {"score": "random"},
    ),
    "vicinity": _preset("full", "dInfer", "", cache="vicinity", **_fast),
    "left_to_right": _preset("any", "JustGRPO", score="left_to_right"),
    "freecache_guided": _preset(
        "any", FREECACHE, "exact caches; drafts are drawn at the temperature; a guide of no use is asked ever more rarely",
        **_guided,
    ),
    "freecache_speculative": _preset(
        "any", FREECACHE, "the repository's variant in which the guide corrects the draft, with exact caches; not for training",
        **_guided | {"options": {"correct": True, "patience": 16}},
    ),
}  # fmt: skip


def preset_settings(name: str) -> dict[str, Any]:
    """Every key of `DecoderConfig` but the recipe's own, as the preset has it. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"decoder.preset={name}: known are {', '.join(PRESETS)}; did you mean {near}?")
    default = dataclasses.asdict(DecoderConfig())
    return {k: v for k, v in default.items() if k not in OWN_KEYS} | PRESETS[name].settings | {"preset": name}


def decoder_config(name: str, **changes: Any) -> DecoderConfig:
    """A named decoder with changes: `decoder_config("fast_dllm_dual", max_tokens=256)`."""
    return DecoderConfig(**preset_settings(name) | changes)
