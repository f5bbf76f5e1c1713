"""Published methods as settings of `algo`: what `algo.preset=NAME` sets beside its row planner.

`tracerl` and `random_mask` set nothing: their numbers are the schema's defaults and the recipe's own. The published KL terms
are against a reference model (except TraceRL's); ours is against the policy that opened the step.
"""

from __future__ import annotations

import difflib
from typing import Any

from rlpipe.errors import ConfigError

_wide = {"advantage": "mean", "clip_low": 0.5, "clip_high": 0.5, "kl_coef": 0.04, "kl_estimator": "k3", "kl_normalizer": ""}

ALGO_PRESETS: dict[str, dict[str, Any]] = {
    "tracerl": {},  # arXiv 2509.06949
    "random_mask": {},  # the random-masking baseline of the same code
    "dipo": {  # DiRL, arXiv 2512.22234
        "shrink": 1, "advantage": "zscore", "clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.1, "kl_estimator": "k3",
        "kl_normalizer": "", "normalizer": "row_mean", "options": {},
    },
    "cj_grpo": _wide | {"shrink": 1, "normalizer": "step_mean", "options": {"tail": True}},  # arXiv 2509.23924
    "d2_stepmerge": _wide | {"shrink": 1, "normalizer": "token_mean", "options": {"count": 16}},  # arXiv 2509.21474
    "agrpo": {  # arXiv 2510.04019
        "shrink": 1, "advantage": "mean", "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "normalizer": "response_sum",
        "kl_normalizer": "", "options": {"count": 24},
    },
    "just_grpo": {  # arXiv 2601.15165
        "shrink": 1, "advantage": "zscore", "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "normalizer": "constant",
        "kl_normalizer": "", "options": {"fraction": 1.0},
    },
    "diffu_grpo": _wide | {"shrink": 1, "normalizer": "token_mean", "options": {}},  # d1, arXiv 2504.12216
}  # fmt: skip


def algo_settings(name: str) -> dict[str, Any]:
    """Keys of `algo` that a preset sets, its name among them. Raises ConfigError for an unknown name, with the nearest one."""
    if name not in ALGO_PRESETS:
        near = difflib.get_close_matches(name, ALGO_PRESETS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"algo.preset={name}: known are {', '.join(ALGO_PRESETS)}; did you mean {near}?")
    return ALGO_PRESETS[name] | {"preset": name}
