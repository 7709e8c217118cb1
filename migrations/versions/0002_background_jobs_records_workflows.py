"""Background jobs, one call per intent, records of runs that are over, the registry of workflows."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from switchboard import jobs

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("agent_runs", sa.Column("heard_at", sa.DateTime(timezone=True), nullable=True))

    op.add_column("executions", sa.Column("idempotency_key", sa.String(length=255), nullable=True))
    op.create_unique_constraint(op.f("executions_idempotency_key_key"), "executions", ["idempotency_key"])
    op.add_column(
        "executions",
        sa.Column("answer_by", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
    )
    op.add_column("executions", sa.Column("unconfirmed", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    # Whose runs may still show up.
    op.execute("UPDATE executions SET unconfirmed = true WHERE status = 'submission_unknown'")

    op.add_column(
        "held_callbacks", sa.Column("session_ended", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    )
    op.create_index("idx_held_callbacks_execution", "held_callbacks", ["execution_id"], unique=False)

    op.create_table(
        "run_records",
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.Column("record", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("run_id", name=op.f("run_records_pkey")),
    )
    op.create_table(
        "workflows",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("hook_url", sa.Text(), nullable=False),
        sa.Column("hook_key", sa.Text(), nullable=True),
        sa.Column("environment", sa.String(length=50), server_default="production", nullable=False),
        sa.Column("approval_url", sa.Text(), nullable=True),
        sa.Column("org_slug", sa.String(length=255), nullable=True),
        sa.Column("platform_id", sa.String(length=255), nullable=True),
        sa.Column("active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("workflows_pkey")),
    )
    _run_script(jobs.install_script())


def downgrade() -> None:
    _run_script(jobs.uninstall_script())
    for table in ("workflows", "run_records"):
        op.drop_table(table)
    op.drop_index("idx_held_callbacks_execution", "held_callbacks")
    op.drop_column("held_callbacks", "session_ended")
    for column in ("unconfirmed", "answer_by", "idempotency_key"):
        op.drop_column("executions", column)
    op.drop_column("agent_runs", "heard_at")


def _run_script(script: str) -> None:
    """Runs statements that stand in one text, which a prepared statement cannot."""
    connection: Any = op.get_bind().connection.dbapi_connection
    connection.run_async(lambda driver: driver.execute(script))
