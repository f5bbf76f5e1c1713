"""Token weights: closed forms, and a loss that does not depend on how the update is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_objectives import plain_entries

from rlpipe.config import AlgoConfig
from rlpipe.errors import ConfigError
from rlpipe.objectives.objective import build_objective
from rlpipe.objectives.reducers import KL_NORMALIZERS, NORMALIZERS, unit_weights
from rlpipe.objectives.rows import Rows
from rlpipe.objectives.units import join


def rows_of(scored) -> Rows:
    scored = np.array(scored, bool)
    return Rows(masked=scored.copy(), scored=scored, step=np.zeros(len(scored), np.int32))


def units_of(rows: Rows, kind: str = "token"):
    return join(rows, kind, np.zeros(rows.response_len, np.int64))


def weights_of(rows, **choices):
    """Each scored token its own unit."""
    return unit_weights([units_of(part) for part in rows], **choices)


TWO = [rows_of([[1, 1, 0], [0, 0, 1]]), rows_of([[1, 1, 1, 1]])]
NONE = Rows(masked=np.zeros((0, 5), bool), scored=np.zeros((0, 5), bool), step=np.zeros(0, np.int32))


@pytest.mark.parametrize(
    ("normalizer", "first", "second"),
    [
        ("response_length", [1 / 12] * 3, [1 / 12] * 4),
        ("row_mean", [1 / 6, 1 / 6, 1 / 3], [1 / 12] * 4),
        ("row_sum", [1 / 3] * 3, [1 / 3] * 4),
        ("step_mean", [1 / 8, 1 / 8, 1 / 4], [1 / 8] * 4),
        ("step_sum", [1 / 4, 1 / 4, 1 / 2], [1 / 8] * 4),
        ("response_sum", [1 / 2] * 3, [1 / 2] * 4),
        ("length_mean", [1 / 7] * 3, [1 / 7] * 4),
        ("length_sum", [1 / 2] * 3, [1 / 2] * 4),
        ("sequence_mean", [1 / 6] * 3, [1 / 8] * 4),
        ("token_mean", [1 / 7] * 3, [1 / 7] * 4),
        ("constant", [1 / 20] * 3, [1 / 20] * 4),
    ],
)
def test_weights(normalizer, first, second):
    got = weights_of(TWO, normalizer=normalizer, response_lens=[3, 4], max_tokens=10)
    assert [w.dtype for w in got] == [np.float32] * 2
    assert got[0] == pytest.approx(first) and got[1] == pytest.approx(second)


@pytest.mark.parametrize("normalizer", KL_NORMALIZERS)
def test_responses_without_rows(normalizer):
    got = weights_of([NONE, *TWO], normalizer=normalizer, response_lens=[3, 3, 4], max_tokens=10)
    assert len(got[0]) == 0
    scale = 2 / 3 if normalizer == "constant" else 1  # only Dr.GRPO's divisor counts responses that score nothing
    without = weights_of(TWO, normalizer=normalizer, response_lens=[3, 4], max_tokens=10)
    assert all(a == pytest.approx(b * scale) for a, b in zip(got[1:], without, strict=True))
    assert [len(w) for w in weights_of([NONE], normalizer=normalizer, response_lens=[5], max_tokens=9)] == [0]
    assert weights_of([], normalizer=normalizer, response_lens=[], max_tokens=9) == []


def test_means_add_up_to_one():
    rng = np.random.default_rng(0)
    rows = [rows_of(rng.random((int(rng.integers(1, 5)), 9)) < 0.4) for _ in range(20)]
    rows = [r for r in rows if r.scored.any(1).all()]
    for normalizer in ("row_mean", "sequence_mean", "token_mean"):
        weights = weights_of(rows, normalizer=normalizer, response_lens=[9] * len(rows))
        assert sum(w.sum(dtype=np.float64) for w in weights) == pytest.approx(1.0, abs=1e-6)


def test_equal_counts_make_the_means_equal():
    """Static decoding, equal counts: the means over tokens, over rows and over responses are one."""
    rows = [rows_of(np.kron(np.eye(4), np.ones((1, 2)))) for _ in range(3)]
    weights = {
        name: np.concatenate(weights_of(rows, normalizer=name, response_lens=[8] * 3))
        for name in NORMALIZERS
        if name != "constant"
    }
    assert weights["row_mean"] == pytest.approx(weights["sequence_mean"])
    assert weights["row_mean"] == pytest.approx(weights["step_mean"])
    assert weights["response_sum"] == pytest.approx(weights["row_mean"] * 8), "eight tokens a response"
    assert weights["row_mean"] == pytest.approx(weights["token_mean"])
    ratio = weights["response_length"] / weights["row_mean"]
    assert ratio == pytest.approx(ratio[0])


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("kl_normalizer", ["", "row_sum"])
def test_splitting_and_permuting_leave_the_loss_equal(normalizer, kl_normalizer):
    rng = np.random.default_rng(1)
    rows = [rows_of(rng.random((int(rng.integers(0, 4)), 12)) < 0.3) for _ in range(11)]
    lens = [12] * len(rows)
    algo = AlgoConfig(normalizer=normalizer, kl_normalizer=kl_normalizer, kl_coef=0.05)
    objective = build_objective(algo, max_tokens=12)
    counts = [r.num_scored for r in rows]
    columns = [
        [torch.from_numpy(c).double() for c in np.split(column, np.cumsum(counts)[:-1])]
        for column in (rng.normal(-2, 0.3, sum(counts)), rng.normal(-2, 0.3, sum(counts)), rng.normal(size=sum(counts)))
    ]
    weights = [[torch.from_numpy(w).double() for w in part] for part in objective.weights([units_of(r) for r in rows], lens)]

    def total(parts) -> tuple[float, torch.Tensor, dict[str, float]]:
        logp = [c.clone().requires_grad_() for c in columns[0]]
        loss, sums = 0.0, {}
        for part in parts:
            if not sum(counts[i] for i in part):
                continue
            pick = lambda column, part=part: torch.cat([column[i] for i in part])  # noqa: E731
            entries = plain_entries(pick(columns[2]), pick(weights[0]), pick(weights[1]))
            terms = objective.loss(pick(logp), pick(columns[1]), entries)
            terms.loss.backward()
            loss += terms.loss.item()
            for name, value in terms.sums.items():
                largest = name.startswith("max_")
                sums[name] = max(sums.get(name, 0.0), float(value)) if largest else sums.get(name, 0.0) + float(value)
        return loss, torch.cat([c.grad if c.grad is not None else torch.zeros_like(c) for c in logp]), sums

    whole, gradient, sums = total([list(range(len(rows)))])
    order = rng.permutation(len(rows)).tolist()
    for parts in ([[i] for i in order], [order[:3], order[3:4], order[4:]]):
        loss, split_gradient, split_sums = total(parts)
        assert loss == pytest.approx(whole, abs=1e-7)
        assert torch.allclose(gradient, split_gradient, atol=1e-7, rtol=0)
        assert split_sums == pytest.approx(sums, rel=1e-5)


def test_weights_depend_on_the_whole_update_only_through_its_counts():
    reversed_weights = weights_of(TWO[::-1], normalizer="row_mean", response_lens=[4, 3])
    straight = weights_of(TWO, normalizer="row_mean", response_lens=[3, 4])
    assert all((a == b).all() for a, b in zip(reversed_weights[::-1], straight, strict=True))


@pytest.mark.parametrize("kind", ("position", "sequence"))
def test_units_that_span_rows_count_a_response_as_one_row(kind):
    """Per token the weights of such a response add up to those of a response scored in one row."""
    units = [units_of(rows, kind) for rows in TWO]
    sizes = [len(u) for u in units]
    assert sizes == ([3, 4] if kind == "position" else [1, 1])
    for name, total in (("row_mean", 1.0), ("step_mean", 1.0), ("sequence_mean", 1.0), ("token_mean", 1.0), ("step_sum", 1.0)):
        got = unit_weights(units, normalizer=name, response_lens=[3, 4])
        assert sum(w.sum() for w in got) == pytest.approx(total) and [len(w) for w in got] == sizes
        if name != "token_mean":
            assert [w.sum() for w in got] == pytest.approx([0.5, 0.5])
    lengths = unit_weights(units, normalizer="length_mean", response_lens=[3, 4])
    assert [w.sum() for w in lengths] == pytest.approx([3 / 7, 4 / 7])
    sums = unit_weights(units, normalizer="length_sum", response_lens=[3, 4])
    assert [w.sum() for w in sums] == pytest.approx([1.5, 2.0])


def test_bad_requests():
    with pytest.raises(ConfigError, match="max_tokens"):
        weights_of(TWO, normalizer="constant", response_lens=[3, 4])
    with pytest.raises(ConfigError, match="token_mean"):
        weights_of(TWO, normalizer="tokens", response_lens=[3, 4])
    with pytest.raises(ValueError, match="response lengths"):
        weights_of(TWO, normalizer="token_mean", response_lens=[3])
