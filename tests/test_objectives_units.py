"""How scored entries join into units of the ratio, in numpy and in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlpipe.errors import ConfigError
from rlpipe.objectives.entries import Entries
from rlpipe.objectives.rows import Rows
from rlpipe.objectives.units import UNITS, join

SCORED = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 0, 1]], bool)
BLOCKS = np.array([0, 0, 1, 1])
NONE = np.zeros(4, np.int64)


def rows_of(scored=SCORED, **fields) -> Rows:
    return Rows(masked=scored.copy(), scored=scored, step=np.zeros(len(scored), np.int32), **fields)


@pytest.mark.parametrize(
    ("kind", "blocks", "entry", "row", "span"),
    [
        ("token", BLOCKS, [0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 1, 2, 2], [1] * 7),
        ("position", BLOCKS, [0, 1, 1, 2, 3, 0, 3], [0, 0, 0, 0], [1] * 4),
        ("step", NONE, [0, 0, 1, 1, 1, 2, 2], [0, 1, 2], [2, 3, 2]),
        ("step", BLOCKS, [0, 0, 1, 2, 2, 3, 4], [0, 1, 1, 2, 2], [2, 1, 2, 1, 1]),
        ("sequence", BLOCKS, [0] * 7, [0], [4]),
    ],
)
def test_join(kind, blocks, entry, row, span):
    units = join(rows_of(), kind, blocks)
    assert units.entry.tolist() == entry and units.row.tolist() == row and units.span.tolist() == span
    assert units.coefficient == pytest.approx([1 / 7 if kind == "sequence" else 1.0] * 7)
    assert units.weight.tolist() == [1.0] * len(units) and units.credit is None
    assert units.plain == (kind == "token")


def test_a_sequence_spans_all_tokens_of_the_response():
    assert join(rows_of(), "sequence", NONE, 9).span.tolist() == [9] and join(rows_of(), "position", NONE, 9).span.max() == 1


def test_coefficients_join_log_probabilities_and_weigh_single_tokens():
    coefficient = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    weight = np.array([1.0, 2.0, 4.0], np.float32)
    rows = rows_of(coefficient=coefficient, weight=weight)
    for kind in ("position", "step", "sequence"):
        assert join(rows, kind, NONE).coefficient.tolist() == coefficient[SCORED].tolist()
    token = join(rows, "token", NONE)
    assert token.plain and token.weight.tolist() == (coefficient * weight[:, None])[SCORED].tolist()
    assert join(rows, "step", NONE).weight.tolist() == [1.0, 2.0, 4.0]


def test_credit_belongs_to_rows():
    rows = rows_of(credit=np.array([0.5, -1.0, 2.0], np.float32))
    assert join(rows, "token", NONE).credit.tolist() == [0.5, 0.5, -1.0, -1.0, -1.0, 2.0, 2.0]
    assert join(rows, "step", BLOCKS).credit.tolist() == [0.5, -1.0, -1.0, 2.0, 2.0]
    for kind in ("position", "sequence"):
        with pytest.raises(ValueError, match="an advantage each"):
            join(rows, kind, NONE)


def test_nothing_scored_and_unknown_kinds():
    empty = rows_of(np.zeros((0, 4), bool))
    assert [len(join(empty, kind, NONE)) for kind in UNITS] == [0] * 4
    with pytest.raises(ConfigError, match="did you mean sequence"):
        join(rows_of(), "sequences", NONE)


@pytest.mark.parametrize("kind", UNITS)
def test_entries_join_as_planned(kind):
    rng = np.random.default_rng(0)
    rows = rows_of(coefficient=rng.random((3, 4)).astype(np.float32))
    units = join(rows, kind, BLOCKS)
    logp = rng.normal(-1, 1, 7)
    expected = np.bincount(units.entry, units.coefficient * logp)
    entries = Entries(
        unit=torch.from_numpy(units.entry).long(),
        coefficient=torch.from_numpy(units.coefficient),
        advantage=torch.zeros(len(units)),
        policy_weight=torch.zeros(len(units)),
        kl_weight=torch.zeros(len(units)),
        position=torch.arange(7),
    )
    assert entries.join(torch.from_numpy(logp)).tolist() == pytest.approx(expected.tolist())
    assert entries.join(torch.from_numpy(logp).bfloat16()).dtype == torch.float32
    logp[0] = np.nan
    assert entries.join(torch.from_numpy(logp)).isnan().tolist() == [u == units.entry[0] for u in range(len(units))]
