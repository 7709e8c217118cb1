"""Runs, executions, events, held callbacks."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "agent_runs",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.Column("context_id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("status", sa.String(length=50), server_default="PENDING", nullable=False),
        sa.Column(
            "metadata", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'::jsonb"), nullable=False
        ),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("workflow_id", sa.String(length=255), server_default="default", nullable=False),
        sa.Column("execution_id", sa.Uuid(), nullable=True),
        sa.Column("completed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("timed_out", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.CheckConstraint(
            "status IN ('PENDING', 'RUNNING', 'COMPLETED', 'FAILED', 'CANCELED')", name=op.f("agent_runs_status_known")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("agent_runs_pkey")),
        sa.UniqueConstraint("run_id", name=op.f("agent_runs_run_id_key")),
    )
    op.create_index("idx_agent_runs_context", "agent_runs", ["context_id"], unique=False)
    op.create_index("idx_agent_runs_context_newest", "agent_runs", ["context_id", "created_at", "id"], unique=False)
    op.create_index("idx_agent_runs_execution", "agent_runs", ["execution_id"], unique=False)
    op.create_index("idx_agent_runs_newest", "agent_runs", ["created_at", "id"], unique=False)
    op.create_index("idx_agent_runs_status", "agent_runs", ["status"], unique=False)
    op.create_table(
        "executions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("workflow_id", sa.String(length=255), nullable=False),
        sa.Column("context_id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("status", sa.String(length=50), server_default="pending", nullable=False),
        sa.Column("input", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("completed_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("executions_pkey")),
    )
    op.create_index("idx_executions_status", "executions", ["status", "created_at"], unique=False)
    op.create_table(
        "held_callbacks",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.Column("execution_id", sa.String(length=255), nullable=True),
        sa.Column("event_type", sa.String(length=255), nullable=False),
        sa.Column("status", sa.String(length=50), nullable=True),
        sa.Column("data", postgresql.JSON(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("occurred_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("dedupe_key", sa.Uuid(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("held_callbacks_pkey")),
        sa.UniqueConstraint("dedupe_key", name=op.f("held_callbacks_dedupe_key_key")),
    )
    op.create_index("idx_held_callbacks_created", "held_callbacks", ["created_at"], unique=False)
    op.create_index("idx_held_callbacks_run", "held_callbacks", ["run_id", "id"], unique=False)
    op.create_table(
        "run_events",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.Column("context_id", sa.String(length=255), nullable=False),
        sa.Column("event_type", sa.String(length=255), nullable=False),
        sa.Column("status", sa.String(length=50), nullable=False),
        sa.Column("data", postgresql.JSON(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("occurred_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("dedupe_key", sa.Uuid(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("run_events_pkey")),
        sa.UniqueConstraint("dedupe_key", name=op.f("run_events_dedupe_key_key")),
    )
    op.create_index("idx_run_events_context", "run_events", ["context_id", "id"], unique=False)
    op.create_index("idx_run_events_run", "run_events", ["run_id", "id"], unique=False)

    op.create_table(
        "installation",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("installation_pkey")),
    )
    op.execute("INSERT INTO installation DEFAULT VALUES")


def downgrade() -> None:
    for table in ("installation", "run_events", "held_callbacks", "executions", "agent_runs"):
        op.drop_table(table)
