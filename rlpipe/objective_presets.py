"""Published methods as settings of `algo`: what `algo.preset=NAME` sets beside its row planner.

`tracerl` and `random_mask` set little: their numbers are the schema's defaults and the recipe's own. Every other preset sets
all that makes a method, so that naming another one leaves nothing of the first. Where the published KL term is against the
model that training began with, kl_reference is `initial`, which keeps a second copy of it; `algo.kl_reference=old` does
without.
"""

from __future__ import annotations

import difflib
from typing import Any

from rlpipe.errors import ConfigError


def _method(**changes: Any) -> dict[str, Any]:
    """A method by what differs from clipped token ratios, r - mean and no KL."""
    return {
        "shrink": 1, "advantage": "mean", "ratio": "token", "clip_low": 0.2, "clip_high": 0.2, "clip_dual": 0.0,
        "clip_dynamic": False, "kl_coef": 0.0, "kl_estimator": "k3", "kl_reference": "old", "normalizer": "token_mean",
        "kl_normalizer": "", "redraw": False, "options": {},
    } | changes  # fmt: skip


_wide = {"clip_low": 0.5, "clip_high": 0.5, "kl_coef": 0.04, "kl_reference": "initial"}
_trust_region = {"ratio": "token", "clip_dual": 0.0, "clip_dynamic": False, "redraw": False, "kl_reference": "old"}

ALGO_PRESETS: dict[str, dict[str, Any]] = {
    "tracerl": _trust_region,  # arXiv 2509.06949
    "random_mask": _trust_region | {"shrink": 1},  # the random-masking baseline of the same code
    "dipo": _method(  # DiRL, arXiv 2512.22234
        advantage="zscore", clip_high=0.28, kl_coef=0.1, kl_reference="initial", normalizer="row_mean"
    ),
    "cj_grpo": _method(**_wide, normalizer="step_mean", options={"tail": True}),  # arXiv 2509.23924
    "d2_stepmerge": _method(**_wide, options={"count": 16}),  # arXiv 2509.21474
    "agrpo": _method(normalizer="response_sum", options={"count": 24}),  # arXiv 2510.04019
    "just_grpo": _method(advantage="zscore", normalizer="constant", options={"fraction": 1.0}),  # arXiv 2601.15165
    "diffu_grpo": _method(**_wide),  # d1, arXiv 2504.12216
    "wd1": _method(advantage="softmax", normalizer="response_sum"),  # arXiv 2507.08838; no ratio, so nothing is clipped
    "coupled_grpo": _method(  # DiffuCoder, arXiv 2506.20639: its unit is no probability, hence the wide clip
        advantage="leave_one_out", ratio="position", clip_low=0.5, clip_high=0.5, kl_coef=0.01, kl_reference="lagged",
        kl_lag=64, kl_mix=0.6, redraw=True, options={"low": 0.2, "high": 0.8},  # the reference of TR-DPO, arXiv 2404.09656
    ),
    "espo": _method(  # arXiv 2512.03759: KL of whole responses over their length
        advantage="leave_one_out", ratio="sequence", kl_coef=0.01, kl_estimator="k2", kl_reference="initial",
        normalizer="sequence_mean", kl_normalizer="length_sum", redraw=True, options={"draws": 2, "complement": True},
    ),
    "spg": _method(  # arXiv 2510.09541; no ratio, so nothing is clipped
        ratio="sequence", normalizer="length_mean", options={"draws": 2, "block": 32, "beta": 1.5, "mix": 0.5}
    ),
    "mdpo": _method(  # arXiv 2508.13148; advantages are of steps
        advantage="zscore", kl_coef=0.02, kl_estimator="k2", kl_reference="initial", normalizer="step_sum", options={"steps": 8}
    ),
}  # fmt: skip
WITHOUT_STEP_MAP = ("random_mask", "coupled_grpo", "espo", "spg", "mdpo")  # may follow decoders that take tokens back


def algo_settings(name: str) -> dict[str, Any]:
    """Keys of `algo` that a preset sets, its name among them; a user's own (`file.py:NAME`) sets no other. Raises ConfigError
    for an unknown name, with the nearest one."""
    if ":" in name:
        return {"preset": name}
    if name not in ALGO_PRESETS:
        near = difflib.get_close_matches(name, ALGO_PRESETS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"algo.preset={name}: known are {', '.join(ALGO_PRESETS)}; did you mean {near}?")
    return ALGO_PRESETS[name] | {"preset": name}
