"""What somebody may see: the contexts and the workflows whose runs are there for them."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ARRAY, ColumnElement, Select, String, any_, literal


@dataclass(frozen=True, slots=True)
class Sight:
    """A run outside of it does not exist for whoever has it. None narrows nothing."""

    contexts: frozenset[str] | None = None
    workflows: frozenset[str] | None = None

    def covers(self, context_id: str, workflow_id: str) -> bool:
        """Whether a run of this context and workflow is to be seen."""
        return (self.contexts is None or context_id in self.contexts) and (
            self.workflows is None or workflow_id in self.workflows
        )

    def narrow(
        self, query: Select[Any], context_id: ColumnElement[str], workflow_id: ColumnElement[str]
    ) -> Select[Any]:
        """Leaves out what is not to be seen; the columns say whose context and workflow a row is."""
        for column, allowed in ((context_id, self.contexts), (workflow_id, self.workflows)):
            if allowed is not None:
                query = query.where(column == any_(literal(sorted(allowed), ARRAY(String))))
        return query


EVERYTHING = Sight()
"""For background work, and for who may see all."""
