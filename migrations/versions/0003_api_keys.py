"""API keys, whose executions are whose, and the workflow of each event."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("scopes", sa.ARRAY(sa.String(length=50)), nullable=False),
        sa.Column("workflows", sa.ARRAY(sa.String(length=255)), nullable=True),
        sa.Column("active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("monthly_limit", sa.Integer(), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "scopes <@ ARRAY['app', 'public', 'admin']::varchar[] AND cardinality(scopes) > 0",
            name=op.f("api_keys_scopes_known"),
        ),
        sa.CheckConstraint("monthly_limit > 0", name=op.f("api_keys_monthly_limit_positive")),
        sa.PrimaryKeyConstraint("id", name=op.f("api_keys_pkey")),
    )
    op.create_table(
        "api_key_digests",
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("digest", name=op.f("api_key_digests_pkey")),
    )
    op.create_index("idx_api_key_digests_key", "api_key_digests", ["key_id"], unique=False)
    op.create_table(
        "api_key_usage",
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("month", sa.Date(), nullable=False),
        sa.Column("executions", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("key_id", "month", name=op.f("api_key_usage_pkey")),
    )

    op.add_column("executions", sa.Column("owner", sa.String(length=255), server_default="", nullable=False))
    op.add_column("executions", sa.Column("key_id", sa.Uuid(), nullable=True))
    op.drop_constraint("executions_idempotency_key_key", "executions")
    op.create_unique_constraint("executions_owner_idempotency_key_key", "executions", ["owner", "idempotency_key"])

    op.add_column(
        "run_events", sa.Column("workflow_id", sa.String(length=255), server_default="default", nullable=False)
    )
    op.execute(
        "UPDATE run_events SET workflow_id = agent_runs.workflow_id FROM agent_runs "
        "WHERE agent_runs.run_id = run_events.run_id AND agent_runs.workflow_id <> 'default'"
    )


def downgrade() -> None:
    op.drop_column("run_events", "workflow_id")
    op.drop_constraint("executions_owner_idempotency_key_key", "executions")
    # Of several owners' executions with one key, the first keeps it.
    op.execute(
        "UPDATE executions SET idempotency_key = NULL FROM executions AS earlier "
        "WHERE earlier.idempotency_key = executions.idempotency_key "
        "AND (earlier.created_at, earlier.id) < (executions.created_at, executions.id)"
    )
    op.create_unique_constraint(op.f("executions_idempotency_key_key"), "executions", ["idempotency_key"])
    for column in ("key_id", "owner"):
        op.drop_column("executions", column)
    for table in ("api_key_usage", "api_key_digests", "api_keys"):
        op.drop_table(table)
