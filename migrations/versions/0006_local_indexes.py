"""Indexes whose busy pages stay few however many runs and events there are, and room for updates.

An identity of an event is drawn at random: in an index of all of them every event had a page of its own to read and to
write, which no cache holds. Beside its run's id it lies where the run's other events are.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# Of a list whoever filters it wants the newest. The guide's two indexes keep their names, and know the order, too.
_DEDUPE, _STATUS, _WORKFLOW = "idx_run_events_dedupe", "idx_agent_runs_status", "idx_agent_runs_workflow"
_TIMED_OUT, _CONTEXT = "idx_agent_runs_timed_out", "idx_agent_runs_context"
_APPROVALS = "idx_approvals_run"

# Pages with room for the next version of a row, so that an update which no index knows of leaves the indexes alone.
_UPDATED = ("agent_runs", "executions", "deliveries")


# In the one writer's turn: who is in the middle of one has locked the table that is locked here. Whoever only reads it
# has it locked, too, perhaps for hours, and everybody would wait behind this: so it lets go, and tries again.
_IN_A_QUIET_MOMENT = """
DO $$
BEGIN
    LOOP
        BEGIN
            SET LOCAL lock_timeout = '500ms';
            PERFORM pg_advisory_xact_lock(7308060441651407467);
            {changes};
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(1);
        END;
    END LOOP;
END
$$
"""


def upgrade() -> None:
    # Beside the traffic: what is built takes minutes where there are many millions of events. It may be interrupted,
    # and begins again.
    with op.get_context().autocommit_block():
        _build(_DEDUPE, "run_events", ["run_id", "dedupe_key"], unique=True, where="dedupe_key IS NOT NULL")
        _build(f"{_STATUS}_newest", "agent_runs", ["status", "created_at", "id"])
        _build(_WORKFLOW, "agent_runs", ["workflow_id", "created_at", "id"])
        _build(_TIMED_OUT, "agent_runs", ["updated_at"], where="timed_out")
        _build(_APPROVALS, "approvals", ["run_id"])
        for name in (_STATUS, _CONTEXT):
            op.drop_index(name, table_name="agent_runs", if_exists=True, postgresql_concurrently=True)
    changes = [
        *(f"ALTER INDEX {name}_newest RENAME TO {name}" for name in (_STATUS, _CONTEXT)),
        *(f"ALTER TABLE {table} SET (fillfactor = 85)" for table in _UPDATED),
        "ALTER TABLE run_events DROP CONSTRAINT run_events_dedupe_key_key",
    ]
    op.execute(_IN_A_QUIET_MOMENT.format(changes="; ".join(changes)))


def downgrade() -> None:
    op.create_unique_constraint(op.f("run_events_dedupe_key_key"), "run_events", ["dedupe_key"])
    for table in _UPDATED:
        op.execute(f"ALTER TABLE {table} RESET (fillfactor)")
    op.execute(f"ALTER INDEX {_CONTEXT} RENAME TO {_CONTEXT}_newest")
    op.create_index(_CONTEXT, "agent_runs", ["context_id"], unique=False)
    for name, table in (
        (_APPROVALS, "approvals"),
        (_TIMED_OUT, "agent_runs"),
        (_WORKFLOW, "agent_runs"),
        (_DEDUPE, "run_events"),
    ):
        op.drop_index(name, table_name=table)
    op.drop_index(_STATUS, table_name="agent_runs")
    op.create_index(_STATUS, "agent_runs", ["status"], unique=False)


def _build(name: str, table: str, columns: list[str], *, unique: bool = False, where: str | None = None) -> None:
    # Half of one may be there, from an attempt that was interrupted.
    op.drop_index(name, table_name=table, if_exists=True, postgresql_concurrently=True)
    only = None if where is None else sa.text(where)
    op.create_index(name, table, columns, unique=unique, postgresql_where=only, postgresql_concurrently=True)
