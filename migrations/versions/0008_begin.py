"""The short way of new runs: those of executions that nobody has heard anything else of, in one statement."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# As the function that appends events: the lock comes first, and whatever is looked for is found by an index, whichever
# plan was made of it while the tables were empty.
#
# A start is one execution and the runs that HappyRobot has named for it; `places` says to which start each run belongs.
# Left to the long way are those of which a run is known already or has something held, those that are not pending any
# more, and those whose key wants to be told. Of the others a row comes back for each run.
_BEGIN = """
CREATE FUNCTION switchboard_begin(
    execution_ids uuid[], names varchar[], payloads text[], run_ids varchar[], places integer[],
    soon interval, rank integer
)
RETURNS TABLE (start integer, id bigint, run_id varchar, created_at timestamptz)
LANGUAGE plpgsql
SET lock_timeout = '3s'
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz;
BEGIN
    PERFORM pg_advisory_xact_lock(7308060441651407467);
    moment := clock_timestamp();
    RETURN QUERY
    WITH named AS MATERIALIZED (
        SELECT
            run.*,
            (SELECT true FROM agent_runs AS known WHERE known.run_id = run.run_id) IS NOT NULL
                OR (SELECT true FROM held_callbacks AS held WHERE held.run_id = run.run_id LIMIT 1) IS NOT NULL
                AS known
        FROM unnest(run_ids, places) WITH ORDINALITY AS run (run_id, place, number)
    ),
    waiting AS MATERIALIZED (
        SELECT
            execution.id, execution.workflow_id, execution.context_id, execution.description,
            array_position(execution_ids, execution.id) AS place
        FROM executions AS execution
        WHERE execution.id = ANY (execution_ids)
            -- Written so that no other index than that of the ids comes into question.
            AND CASE WHEN execution.status = 'pending' THEN execution.began_at IS NULL ELSE false END
            AND execution.approval_status IS NULL
            AND (
                SELECT true FROM api_keys AS key
                WHERE key.id = execution.key_id AND key.active AND key.webhook_url IS NOT NULL
            ) IS NULL
    ),
    sorted AS MATERIALIZED (
        SELECT named.run_id, waiting.*
        FROM named JOIN waiting ON waiting.place = named.place
        WHERE NOT EXISTS (SELECT FROM named AS other WHERE other.place = named.place AND other.known)
        ORDER BY named.number
    ),
    numbered AS MATERIALIZED (
        SELECT sorted.*, nextval('run_events_id_seq') AS event_id, clock_timestamp() AS created_at
        FROM sorted
    ),
    runs AS (
        INSERT INTO agent_runs (
            run_id, context_id, name, description, workflow_id, execution_id, status, created_at, updated_at
        )
        SELECT run_id, context_id, names[place], description, workflow_id, id, 'RUNNING', moment, moment
        FROM numbered
    ),
    events AS (
        INSERT INTO run_events (id, run_id, context_id, workflow_id, event_type, status, data, created_at)
        SELECT event_id, run_id, context_id, workflow_id, 'triggered', 'RUNNING', payloads[place]::json, created_at
        FROM numbered
    ),
    moved AS (
        UPDATE executions AS execution
        SET status = 'running', error = NULL, began_at = moment, updated_at = moment
        WHERE execution.id = ANY (ARRAY (SELECT DISTINCT numbered.id FROM numbered))
    ),
    jobs AS (
        INSERT INTO switchboard_pgqueuer (priority, entrypoint, payload, execute_after, dedupe_key, status)
        SELECT rank, 'reconcile', convert_to(run_id, 'UTF8'), moment + soon, 'reconcile:' || run_id, 'queued'
        FROM numbered
        ON CONFLICT (dedupe_key) WHERE status IN ('queued', 'picked') AND dedupe_key IS NOT NULL DO NOTHING
        RETURNING id, priority, entrypoint
    ),
    noted AS (
        INSERT INTO switchboard_pgqueuer_log (job_id, status, priority, entrypoint)
        SELECT id, 'queued', priority, entrypoint FROM jobs
    )
    SELECT place, event_id, run_id, created_at FROM numbered;
END
$$
"""

_SIGNATURE = "switchboard_begin(uuid[], varchar[], text[], varchar[], integer[], interval, integer)"


def upgrade() -> None:
    op.execute(_BEGIN)


def downgrade() -> None:
    op.execute(f"DROP FUNCTION {_SIGNATURE}")
