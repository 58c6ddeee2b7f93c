"""What a cut needs of each limit, as the profile sees it: polynomials in the numbers of kept units."""

from __future__ import annotations

from typing import get_args

from kiridashi.budget import Limit

from kiridashi_server.budget.problem import Polynomial
from kiridashi_server.budget.profile import Profile
from kiridashi_server.graph.cost import CostModel, Term

LIMITS: tuple[Limit, ...] = get_args(Limit)


def requirements(profile: Profile, costs: CostModel) -> dict[Limit, tuple[Polynomial, ...]]:
    """Memory and file size in bytes, and p95 latency in milliseconds; of several polynomials the largest counts."""
    fixed, per_parameter, per_mac = (profile.tail * coefficient for coefficient in profile.latency)
    return {
        "memory": (_sum((profile.memory[0], ((1, ()),)), (profile.memory[1], costs.parameter_terms)),),
        "file": (_sum((profile.file[0], ((1, ()),)), (profile.file[1], costs.parameter_terms)),),
        "latency": (_sum((fixed, ((1, ()),)), (per_parameter, costs.parameter_terms), (per_mac, costs.mac_terms)),),
    }


def counted(terms: tuple[Term, ...]) -> Polynomial:
    """A cost model's terms as a polynomial."""
    return _sum((1.0, terms))


def _sum(*parts: tuple[float, tuple[Term, ...]]) -> Polynomial:
    return tuple((factor * coefficient, names) for factor, terms in parts for coefficient, names in terms if factor)
