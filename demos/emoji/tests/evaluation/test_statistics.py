"""Intervals of few cases, each with a value that is known."""

import itertools
import math

import pytest
import torch

from mole_world.evaluation.statistics import bootstrap, estimate


def apart(count):
    """Units of cases that share none."""
    return [[str(i)] for i in range(count)]


def test_bootstrap_of_a_constant_and_of_a_known_spread():
    assert bootstrap(torch.full((3, 4), 0.25), apart(3)) == (0.25, 0.25, 0.25)
    coins = torch.tensor([[0.0], [1.0]]).repeat(50, 1)  # 100 cases, half of them 1: standard error 0.05
    mean, low, high = bootstrap(coins, apart(100))
    assert mean == 0.5
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)


def test_bootstrap_resamples_cases_and_not_only_seeds():
    values = torch.tensor([[0.0] * 8, [1.0] * 8])  # no spread within a case, all of it between them
    assert bootstrap(values, apart(2))[1:] == (0.0, 1.0)


def test_cases_that_share_a_concept_stand_and_fall_with_it():
    """What one concept decides is as uncertain as its draw, in however many cases it comes."""
    values = torch.tensor([[1.0]] * 20 + [[0.0]] * 20)
    names = [str(i) for i in range(20)]
    alone = bootstrap(values, apart(40))
    shared = bootstrap(values, [[side, name] for side in "ab" for name in names])
    assert alone[0] == shared[0] == 0.5
    assert alone[1] > 0.3
    assert alone[2] < 0.7
    assert shared[1:] == (0.0, 1.0)


def test_a_case_counts_as_often_as_all_of_its_concepts_came():
    """Three cases of three concepts: all 27 draws counted by hand, those left out that hold no case."""
    values, cases = (0.0, 1.0, 0.5), ((0, 1), (1, 2), (2, 2))
    found = []
    for drawn in itertools.product(range(3), repeat=3):
        weights = [drawn.count(a) * drawn.count(b) for a, b in cases]
        if sum(weights):
            found.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    table = torch.tensor(values)[:, None]
    mean, low, high = bootstrap(table, [[str(c) for c in case] for case in cases], draws=27000)
    every = torch.quantile(torch.tensor(found).repeat(1000), torch.tensor([0.025, 0.975])).tolist()
    assert (mean, [low, high]) == (0.5, pytest.approx(every))


@pytest.mark.parametrize("count", [1, 2, 8, 24])
def test_no_interval_has_no_width(count):
    """What all cases agree on is not certain; Wilson's interval of k of k starts at k / (k + 1.96 squared)."""
    mean, low, high = estimate(torch.ones(count, 3), apart(count), "share")
    assert (mean, high) == (1.0, pytest.approx(1.0))
    assert low == pytest.approx(count / (count + 1.96**2), abs=1e-4)
    assert estimate(torch.zeros(count, 3), apart(count), "share")[2] == pytest.approx(1 - low)
    _, low, high = estimate(torch.zeros(count, 3), apart(count), "change")
    assert high == pytest.approx(-low)
    assert high == pytest.approx(1 - count / (count + 1.96**2), abs=1e-4)
    assert all(map(math.isnan, estimate(torch.full((count, 3), 0.25), apart(count), "measure")[1:]))


def test_few_measures_have_students_interval():
    """Two means that lie 1 apart: half the distance times the quantile of one degree of freedom, 12.706."""
    mean, low, high = estimate(torch.tensor([[0.0], [1.0]]), apart(2), "measure")
    assert (mean, low, high) == (0.5, pytest.approx(0.5 - 6.353, abs=1e-3), pytest.approx(0.5 + 6.353, abs=1e-3))


def test_an_interval_holds_that_of_the_bootstrap():
    """Cases that share a concept say less than their number."""
    values, units = torch.tensor([[1.0]] * 20 + [[0.0]] * 20), [[side, str(i)] for side in "ab" for i in range(20)]
    assert estimate(values, units, "share") == bootstrap(values, units) == (0.5, 0.0, 1.0)
