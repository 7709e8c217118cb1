"""Ids that no other run of the benchmarks has used."""

import itertools
import secrets
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Names:
    """Beginnings of ids; a number follows."""

    mark: str = field(default_factory=lambda: f"b{secrets.token_hex(4)}")
    _measured: "itertools.count[int]" = field(default_factory=itertools.count)

    ONE = 20
    """Runs of their own for those measurements in which everything is about one run."""
    FOLLOWED = 100
    """Runs of the context that streams follow."""

    def fresh(self) -> str:
        """For one measurement: nothing that it names has been named before."""
        return f"{self.mark}_{next(self._measured)}_"

    @property
    def run(self) -> str:
        return f"{self.mark}_run_"

    @property
    def context(self) -> str:
        return f"{self.mark}_context_"

    @property
    def long_run(self) -> str:
        return f"{self.mark}_long_run_"

    @property
    def long_context(self) -> str:
        return f"{self.mark}_long_context_"

    @property
    def followed_run(self) -> str:
        return f"{self.mark}_followed_run_"

    @property
    def followed_context(self) -> str:
        return f"{self.mark}_followed_context_"

    @property
    def one_run(self) -> str:
        return f"{self.mark}_one_run_"

    @property
    def one_context(self) -> str:
        return f"{self.mark}_one_context_"

    @property
    def started_run(self) -> str:
        return f"{self.mark}_started_run_"
