"""Statistics from an index; lists for those who see some contexts or workflows, and of what failed."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_NEWEST = "idx_agent_runs_newest"


def upgrade() -> None:
    _turn()
    _replace_newest(including=["workflow_id", "status", "completed_at"])
    # Of the pages that were not vacuumed lately an index alone is not enough, and statistics are of the latest rows.
    op.execute(
        "ALTER TABLE agent_runs SET "
        "(autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_insert_scale_factor = 0.01)"
    )
    op.create_index("idx_executions_context", "executions", ["context_id"], unique=False)
    op.create_index("idx_executions_workflow", "executions", ["workflow_id"], unique=False)
    failed = sa.text("status = 'failed'")
    op.create_index("idx_deliveries_failed", "deliveries", ["number"], unique=False, postgresql_where=failed)


def downgrade() -> None:
    _turn()
    op.drop_index("idx_deliveries_failed", table_name="deliveries")
    op.drop_index("idx_executions_workflow", table_name="executions")
    op.drop_index("idx_executions_context", table_name="executions")
    op.execute("ALTER TABLE agent_runs RESET (autovacuum_vacuum_scale_factor, autovacuum_vacuum_insert_scale_factor)")
    _replace_newest(including=[])


def _turn() -> None:
    # The one writer's: who is in the middle of one has locked some of these tables, and waits for others.
    op.execute("SELECT pg_advisory_xact_lock(7308060441651407467)")


def _replace_newest(*, including: list[str]) -> None:
    # Made before the old one goes, so that those who only read do not wait.
    other = f"{_NEWEST}_other"
    op.create_index(other, "agent_runs", ["created_at", "id"], unique=False, postgresql_include=including)
    op.drop_index(_NEWEST, table_name="agent_runs")
    op.execute(f"ALTER INDEX {other} RENAME TO {_NEWEST}")
