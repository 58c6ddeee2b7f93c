"""Fitting a device's measurements and forecasting other cuts."""

import msgspec
import pytest
from kiridashi.budget import Measurement
from kiridashi.errors import InputError
from kiridashi_server.budget import ProfilePoint, fit_profile


def measured(parameters: int, macs: int, noise: float = 1.0, runtime: str = "onnxruntime") -> ProfilePoint:
    latency = (0.05 + 1e-7 * parameters + 4e-8 * macs) * noise
    return ProfilePoint(
        parameters,
        macs,
        Measurement(
            memory_bytes=60_000_000 + 9 * parameters,
            file_bytes=150_000 + 4 * parameters,
            latency_p50_ms=latency / 1.25,
            latency_p95_ms=latency,
            latency_p99_ms=latency * 1.2,
            load_ms=20.0,
            runs=100,
            runtime=runtime,
            threads=1,
            hardware="real",
        ),
    )


POINTS = [
    measured(3_371_008, 31_339_392),
    measured(1_700_000, 15_000_000),
    measured(900_000, 11_000_000),
    measured(350_000, 3_000_000),
]


def test_a_noiseless_linear_device_is_forecast_exactly() -> None:
    profile = fit_profile(POINTS, "bench")
    expected = profile.forecast(1_000_000, 7_000_000)
    assert expected.latency_p95_ms == pytest.approx(0.05 + 0.1 + 0.28, rel=1e-6)
    assert expected.memory_bytes == pytest.approx(69_000_000, rel=1e-6)
    assert expected.file_bytes == pytest.approx(4_150_000, rel=1e-6)
    assert max(profile.error) < 1e-6


def test_the_error_is_the_largest_relative_residual() -> None:
    noisy = [*POINTS[:-1], measured(350_000, 3_000_000, noise=1.4)]
    profile = fit_profile(noisy, "bench")
    residuals = [
        abs(profile.forecast(p.parameters, p.macs).latency_p95_ms / 1.25 / p.measured.latency_p50_ms - 1) for p in noisy
    ]
    assert profile.error[2] == pytest.approx(max(residuals))
    assert profile.error[2] > 0.01


def test_a_disturbed_tail_at_one_point_does_not_bend_the_forecast() -> None:
    hit = msgspec.structs.replace(POINTS[1], measured=msgspec.structs.replace(POINTS[1].measured, latency_p95_ms=50.0))
    quiet, disturbed = fit_profile(POINTS, "bench"), fit_profile([POINTS[0], hit, *POINTS[2:]], "bench")
    assert disturbed.forecast(10**6, 10**7) == quiet.forecast(10**6, 10**7)


def test_a_correction_makes_the_forecast_right_where_it_was_measured() -> None:
    profile = fit_profile(POINTS, "bench")
    slower = measured(800_000, 6_000_000, noise=1.3)
    corrected = profile.corrected(slower)
    assert corrected.forecast(800_000, 6_000_000).latency_p95_ms == pytest.approx(slower.measured.latency_p95_ms)
    assert corrected.forecast(400_000, 3_000_000).latency_p95_ms > profile.forecast(400_000, 3_000_000).latency_p95_ms


@pytest.mark.parametrize(
    "points", [POINTS[:2], [*POINTS[:2], measured(900_000, 11_000_000, runtime="litert")]], ids=["two", "mixed"]
)
def test_what_cannot_be_fitted_is_refused(points: list[ProfilePoint]) -> None:
    with pytest.raises(InputError, match="cannot be fitted"):
        fit_profile(points, "bench")
