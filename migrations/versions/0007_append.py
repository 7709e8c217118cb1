"""The short way into the timeline: events that say nothing new about where their runs stand, in one statement."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# The lock comes first, and each statement of a function sees what was committed before it began: so whatever the
# turns before have written is there to be seen, which it would not be in one statement that also takes the lock.
#
# Nothing in it can be planned otherwise than as a look into an index for each event, whatever is known about the sizes
# of tables at the moment: subqueries stand where a join could read a whole one,
# and a CASE where a condition could lead to an index that is no help.
#
# And it waits for nothing but its turn: a job that somebody is about to take is left to them.
#
# A row comes back for each event that was written, and one without an id for each that had been written before. Of
# the others, which is all events of their runs, nothing is done.
_APPEND = """
CREATE FUNCTION switchboard_append(
    run_ids varchar[], event_types varchar[], words varchar[], payloads text[], moments timestamptz[], keys uuid[],
    soon interval, rank integer
)
RETURNS TABLE (
    place bigint, id bigint, context_id varchar, workflow_id varchar, status varchar, created_at timestamptz
)
LANGUAGE plpgsql
SET lock_timeout = '3s'
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
#variable_conflict use_column
DECLARE
    due timestamptz;
BEGIN
    PERFORM pg_advisory_xact_lock(7308060441651407467);
    due := clock_timestamp() + soon;
    RETURN QUERY
    WITH given AS MATERIALIZED (
        SELECT *
        FROM unnest(run_ids, event_types, words, payloads, moments, keys) WITH ORDINALITY
            AS event (run_id, event_type, word, payload, occurred_at, dedupe_key, place)
    ),
    said AS MATERIALIZED (
        SELECT run_id, word FROM given WHERE word IS NOT NULL
    ),
    known AS MATERIALIZED (
        SELECT
            run.run_id, run.context_id, run.workflow_id, run.status,
            run.timed_out OR run.status NOT IN ('COMPLETED', 'FAILED', 'CANCELED') AS unsettled
        FROM agent_runs AS run
        WHERE run.run_id = ANY (run_ids)
            AND NOT EXISTS (SELECT FROM said WHERE said.run_id = run.run_id AND said.word <> run.status)
            AND (SELECT true FROM held_callbacks AS held WHERE held.run_id = run.run_id LIMIT 1) IS NULL
    ),
    sorted AS MATERIALIZED (
        SELECT
            given.*, known.context_id, known.workflow_id, known.status, known.unsettled,
            (
                SELECT true FROM run_events AS copy
                WHERE copy.run_id = given.run_id AND copy.dedupe_key = given.dedupe_key
            ) AS seen
        FROM given JOIN known ON known.run_id = given.run_id
        ORDER BY given.place
    ),
    numbered AS MATERIALIZED (
        SELECT sorted.*, nextval('run_events_id_seq') AS id, clock_timestamp() AS created_at
        FROM sorted
        WHERE seen IS NULL
    ),
    written AS (
        INSERT INTO run_events (
            id, run_id, context_id, workflow_id, event_type, status, data, occurred_at, created_at, dedupe_key
        )
        SELECT
            id, run_id, context_id, workflow_id, event_type, status, payload::json, occurred_at, created_at, dedupe_key
        FROM numbered
    ),
    hastened AS (
        UPDATE switchboard_pgqueuer AS job
        SET execute_after = due, priority = rank
        WHERE job.id = ANY (
            ARRAY (
                SELECT sleeping.id
                FROM switchboard_pgqueuer AS sleeping
                WHERE sleeping.dedupe_key = ANY (
                        ARRAY (SELECT DISTINCT 'reconcile:' || run_id FROM numbered WHERE unsettled)
                    )
                    AND sleeping.status IN ('queued', 'picked')
                    AND CASE WHEN sleeping.status = 'queued' THEN sleeping.execute_after > due ELSE false END
                FOR UPDATE SKIP LOCKED
            )
        )
    )
    SELECT place, id, context_id, workflow_id, status, created_at FROM numbered
    UNION ALL
    SELECT place, NULL, context_id, workflow_id, status, NULL FROM sorted WHERE seen;
END
$$
"""

_SIGNATURE = "switchboard_append(varchar[], varchar[], varchar[], text[], timestamptz[], uuid[], interval, integer)"


def upgrade() -> None:
    op.execute(_APPEND)


def downgrade() -> None:
    op.execute(f"DROP FUNCTION {_SIGNATURE}")
