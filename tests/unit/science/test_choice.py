"""A measure is chosen only if it beats the constant ranking by more than one standard error."""

import numpy as np
import pytest
from assessed import make_assessment
from kiridashi_server.similarity.choice import choose_measure

UPWARDS = {"a": 0.1, "b": 0.2, "c": 0.3}
FLAT = dict.fromkeys(UPWARDS, 0.0)


def _bank(**tilted):
    """Eight tasks; ``tilted`` gives by measure what its tilt gains each of them over the uniform bank."""
    names = {name.replace("_", "-"): values for name, values in tilted.items()}
    return [
        make_assessment(
            f"task {number}",
            similarities={"uniform": FLAT, **dict.fromkeys(names, UPWARDS)},
            composed={name: 0.6 + float(values[number]) for name, values in names.items()},
        )
        for number in range(8)
    ]


def _row(choice, name):
    return next(row for row in choice.rows if row.measure == name)


def test_a_clear_gain_wins_and_says_by_how_much():
    choice = choose_measure(_bank(knn=np.linspace(0.02, 0.04, 8)))
    assert choice.measure == "knn"
    assert "+3.0 points" in choice.reason
    row = _row(choice, "knn")
    assert row.gain == pytest.approx(0.03)
    assert row.gain_error == pytest.approx(np.linspace(0.02, 0.04, 8).std(ddof=1) / np.sqrt(8))
    assert row.spearman == pytest.approx(1)


def test_a_gain_within_one_standard_error_leaves_the_uniform_bank():
    noisy = np.array([0.1, -0.09, 0.1, -0.1, 0.1, -0.09, 0.1, -0.1])
    choice = choose_measure(_bank(knn=noisy, frechet=noisy - 0.05))
    assert choice.measure == "uniform"
    assert "all records weigh the same: the best measure, knn" in choice.reason


def test_a_right_ranking_alone_earns_no_weight():
    choice = choose_measure(_bank(logme=np.full(8, -0.01)))
    assert (choice.measure, _row(choice, "logme").spearman) == ("uniform", pytest.approx(1))


def test_of_measures_about_as_good_the_cheapest_is_taken():
    spread = np.linspace(0.0, 0.06, 8)
    assert choose_measure(_bank(logme=spread, frechet=spread - 0.002)).measure == "frechet"
    assert choose_measure(_bank(logme=spread + 0.2, frechet=spread)).measure == "logme"


def test_luck_among_several_measures_is_told():
    generator = np.random.default_rng(0)
    chances = []
    for _ in range(60):
        noise = generator.normal(0, 0.03, (4, 8))
        chances.append(choose_measure(_bank(knn=noise[0], logme=noise[1], mmd=noise[2], frechet=noise[3])).chance)
    assert np.mean(np.array(chances) <= 0.2) == pytest.approx(0.2, abs=0.15)
    assert np.mean(chances) == pytest.approx(0.5, abs=0.12)
    clear = choose_measure(_bank(knn=np.linspace(0.02, 0.04, 8), mmd=generator.normal(0, 0.03, 8)))
    assert clear.chance < 0.02
    assert "by chance alone the best of 2" in clear.reason


def test_regret_is_what_the_best_cut_in_hindsight_had_more():
    choice = choose_measure(_bank(knn=np.full(8, 0.1)))
    assert _row(choice, "uniform").regret == pytest.approx(0.1)  # the tilted cut had 0.7
    assert _row(choice, "knn").regret == pytest.approx(0)
    assert _row(choice, "uniform").spearman == 0


def test_nothing_assessed_or_one_task_chooses_nothing():
    assert choose_measure([]).measure == "uniform"
    assert choose_measure(_bank(knn=np.full(8, 0.1))[:1]).measure == "uniform"
