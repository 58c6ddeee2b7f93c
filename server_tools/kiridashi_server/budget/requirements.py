"""What a cut needs of each limit, as the profile sees it: polynomials in the numbers of kept units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from kiridashi.budget import Limit
from kiridashi.errors import InputError

from kiridashi_server.budget.profile import FIXED, Forecast, Profile
from kiridashi_server.graph.polynomial import Polynomial, counted, evaluate, weighted_sum
from kiridashi_server.graph.quantities import Quantities

LIMITS: tuple[Limit, ...] = get_args(Limit)


@dataclass(frozen=True, eq=False)
class Requirements:
    """Memory and file size in bytes, and p95 latency in milliseconds; of several polynomials the largest counts."""

    sizes: Mapping[str, int]
    needs: Mapping[Limit, tuple[Polynomial, ...]]

    @classmethod
    def of(cls, profile: Profile, quantities: Quantities) -> Requirements:
        """What the profile expects of the cuts of its backbone.

        Raises:
            InputError: the profile was measured with another backbone or input size.
        """
        if (profile.layout_digest, profile.macs) != (quantities.layout.digest, quantities.costs.macs({})):
            raise InputError(
                f"the profile of {profile.device_class} is of another backbone or another input size",
                why=f"it was measured with {profile.macs:,} multiply-accumulates and the layout "
                f"{profile.layout_digest[:12]}, here are {quantities.costs.macs({}):,} and "
                f"{quantities.layout.digest[:12]}",
                next_step="profile the device with this backbone: kiridashi profile make",
            )
        parameters = counted(quantities.costs.parameter_terms)
        one: Polynomial = ((1.0, ()),)
        work = quantities.workload(profile.block).kinds
        file = weighted_sum([(profile.file.get(FIXED, 0.0), one), (profile.file.get("parameters", 0.0), parameters)])
        memory = [
            weighted_sum(
                [
                    (profile.memory.get(FIXED, 0.0), one),
                    (profile.memory.get("parameters", 0.0), parameters),
                    (profile.memory.get("activations", 0.0), alive),
                ]
            )
            for alive in quantities.activations or ((),)
        ]
        latency = weighted_sum(
            [
                (profile.tail * profile.latency.get(FIXED, 0.0), one),
                *((profile.tail * profile.latency.get(kind, 0.0), terms) for kind, terms in work.items()),
            ]
        )
        return cls(quantities.layout.sizes, {"memory": tuple(memory), "file": (file,), "latency": (latency,)})

    def expected(self, limit: Limit, widths: Mapping[str, int]) -> float:
        """What a cut that keeps ``widths`` units is expected to need; groups left out are whole."""
        counts = {**self.sizes, **widths}
        return max(evaluate(terms, counts) for terms in self.needs[limit])

    def forecast(self, widths: Mapping[str, int]) -> Forecast:
        """The same for all limits."""
        memory, file, latency = (self.expected(limit, widths) for limit in LIMITS)
        return Forecast(memory, file, latency)
