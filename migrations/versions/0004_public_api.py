"""Approvals, what customers are told, and what the Public API knows of keys and executions."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def _moment(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=True)


def _created_at() -> sa.Column[object]:
    return sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False)


def upgrade() -> None:
    # The one writer's turn: who is in the middle of one has locked some of these tables, and waits for others.
    op.execute("SELECT pg_advisory_xact_lock(7308060441651407467)")
    op.alter_column("executions", "answer_by", nullable=True)
    for column in (_moment("began_at"), sa.Column("approval_status", sa.String(length=50), nullable=True)):
        op.add_column("executions", column)
    # What had runs and has failed has begun. Of those with other words that is known.
    op.execute(
        "UPDATE executions SET began_at = created_at WHERE status = 'failed' "
        "AND EXISTS (SELECT FROM agent_runs WHERE agent_runs.execution_id = executions.id)"
    )
    op.add_column("held_callbacks", sa.Column("resume_url", sa.Text(), nullable=True))
    op.create_table(
        "approvals",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("number", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("execution_id", sa.Uuid(), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.Column("status", sa.String(length=50), server_default="pending", nullable=False),
        sa.Column("data", postgresql.JSON(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("require_comment", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("fingerprint", sa.Uuid(), nullable=False),
        sa.Column("resume_url", sa.Text(), nullable=True),
        sa.Column("comment", sa.Text(), nullable=True),
        sa.Column("decided_by", sa.Uuid(), nullable=True),
        _created_at(),
        _moment("shown_at"),
        _moment("decided_at"),
        _moment("told_at"),
        sa.CheckConstraint(
            "status IN ('pending', 'approved', 'rejected', 'withdrawn')", name=op.f("approvals_status_known")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("approvals_pkey")),
        sa.UniqueConstraint("number", name=op.f("approvals_number_key")),
    )
    op.create_index("idx_approvals_execution", "approvals", ["execution_id", "number"], unique=False)
    op.create_index(
        "idx_approvals_pending", "approvals", ["run_id"], unique=False, postgresql_where=sa.text("status = 'pending'")
    )

    for name in ("burst", "per_minute"):
        op.add_column("api_keys", sa.Column(name, sa.Integer(), nullable=True))
    op.add_column("api_keys", sa.Column("webhook_url", sa.Text(), nullable=True))
    op.add_column("api_keys", sa.Column("webhook_events", sa.ARRAY(sa.String(length=50)), nullable=True))
    for name in ("webhook_secret", "webhook_secret_before"):
        op.add_column("api_keys", sa.Column(name, sa.Text(), nullable=True))
    op.add_column("api_keys", _moment("webhook_secret_before_until"))
    op.create_check_constraint(op.f("api_keys_rate_positive"), "api_keys", "burst > 0 AND per_minute > 0")
    op.create_check_constraint(
        op.f("api_keys_webhook_signed"), "api_keys", "webhook_url IS NULL OR webhook_secret IS NOT NULL"
    )

    op.create_table(
        "deliveries",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("number", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("execution_id", sa.Uuid(), nullable=False),
        sa.Column("event", sa.String(length=50), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("status", sa.String(length=50), server_default="pending", nullable=False),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        _moment("claimed_until"),
        _created_at(),
        _moment("finished_at"),
        sa.CheckConstraint("status IN ('pending', 'delivered', 'failed')", name=op.f("deliveries_status_known")),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("deliveries_pkey")),
        sa.UniqueConstraint("number", name=op.f("deliveries_number_key")),
    )
    op.create_index("idx_deliveries_key", "deliveries", ["key_id", "number"], unique=False)
    op.create_index("idx_deliveries_execution", "deliveries", ["execution_id"], unique=False)
    op.create_index(
        "idx_deliveries_pending",
        "deliveries",
        ["key_id", "due_at"],
        unique=False,
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_table(
        "delivery_attempts",
        sa.Column("delivery_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("duration_ms", sa.Integer(), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("response", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["delivery_id"], ["deliveries.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("delivery_id", "number", name=op.f("delivery_attempts_pkey")),
    )


def downgrade() -> None:
    for table in ("delivery_attempts", "deliveries", "approvals"):
        op.drop_table(table)
    for constraint in ("api_keys_webhook_signed", "api_keys_rate_positive"):
        op.drop_constraint(constraint, "api_keys")
    for column in (
        "burst",
        "per_minute",
        "webhook_url",
        "webhook_events",
        "webhook_secret",
        "webhook_secret_before",
        "webhook_secret_before_until",
    ):
        op.drop_column("api_keys", column)
    op.drop_column("held_callbacks", "resume_url")
    # In words that were known before, and with calls that nobody has begun to place left alone for ever.
    op.execute("UPDATE executions SET status = 'running' WHERE status = 'pending_approval'")
    op.execute(
        "UPDATE executions SET status = 'failed', error = 'It was never started', answer_by = created_at, "
        "completed_at = now() WHERE answer_by IS NULL"
    )
    for column in ("approval_status", "began_at"):
        op.drop_column("executions", column)
    op.alter_column("executions", "answer_by", nullable=False)
