"""The pictures of the benchmark of reuse show what the report says."""

from benchmarks.oneshot_plot import gains_picture, growth_picture


def test_a_panel_for_each_limit_and_a_line_for_each_rival():
    figures = {
        "gain_at_once.l1@30": {"value": 5.0, "unit": "points", "ci95": [2.0, 8.0]},
        "gain_at_once.l1@latency": {"value": -1.0, "unit": "points", "ci95": [-3.0, 1.0]},
        "gain_at_once.taylor@30": {"value": 2.0, "unit": "points", "ci95": [1.0, 3.0]},
        "gain.random@30": {"value": 9.0, "unit": "points", "ci95": [8.0, 10.0]},
    }
    picture = gains_picture(figures)
    for text in ("30 % of the parameters", "equal latency", "L1 norms", "own Taylor scores"):
        assert text in picture
    assert "random units" not in picture
    # Two of the three intervals lie right of zero and are drawn in the product's colour.
    assert picture.count("#c8452e") > picture.count("#8a94a0") > 0


def test_growth_names_the_sizes():
    figures = {f"growth.{size}@30": {"value": 0.5 + size / 100, "unit": "share", "ci95": None} for size in (1, 2, 10)}
    picture = growth_picture(figures)
    for text in (">1<", ">2<", ">10<", "past tasks"):
        assert text in picture
