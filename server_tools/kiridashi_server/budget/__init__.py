"""From a device's measurements and composed scores to a plan that fits a budget."""

from __future__ import annotations

from kiridashi_server.budget.profile import Forecast, Profile, ProfilePoint, fit_profile
from kiridashi_server.budget.solver import Solution, plan_cut, plan_size

__all__ = ["Forecast", "Profile", "ProfilePoint", "Solution", "fit_profile", "plan_cut", "plan_size"]
