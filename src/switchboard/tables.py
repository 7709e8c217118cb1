"""Every table, on one page. `migrations/` builds the same; a test compares the two."""

from enum import StrEnum

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    case,
    false,
    func,
    literal_column,
    text,
    true,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB


class RunStatus(StrEnum):
    """Where a run stands, in the guide's words."""

    PENDING = "PENDING"  # queued at HappyRobot
    RUNNING = "RUNNING"  # under way; every new run is taken to be
    COMPLETED = "COMPLETED"  # over, as wished
    FAILED = "FAILED"  # over, by an error or by our timeout
    CANCELED = "CANCELED"  # over, because somebody stopped it or HappyRobot skipped it


FINAL = frozenset({RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELED})
"""The statuses of a run that is over."""


class ExecutionStatus(StrEnum):
    """Where a request to start a workflow stands, in the Public API's words."""

    PENDING = "pending"  # stored; HappyRobot has not answered yet
    SUBMISSION_UNKNOWN = "submission_unknown"  # HappyRobot may have started it, nobody knows; never sent again
    RUNNING = "running"  # HappyRobot named its runs
    PENDING_APPROVAL = "pending_approval"  # one of its runs waits for somebody to decide
    COMPLETED = "completed"  # all its runs are over, none failed
    FAILED = "failed"  # HappyRobot refused it, or one of its runs failed
    CANCELLED = "cancelled"  # all its runs were canceled, or what it asked for was rejected


class ApprovalStatus(StrEnum):
    """Where a request for approval stands."""

    PENDING = "pending"  # waits for a decision
    APPROVED = "approved"
    REJECTED = "rejected"
    WITHDRAWN = "withdrawn"  # there is nothing to decide any more: its run is over, or its execution


class DeliveryStatus(StrEnum):
    """Where an outgoing webhook stands."""

    PENDING = "pending"  # to be sent, for the first time or again
    DELIVERED = "delivered"  # the customer's endpoint answered 2xx
    FAILED = "failed"  # every attempt failed; kept, to be sent again when somebody says so


class WebhookEvent(StrEnum):
    """What a customer can be told of, in the Public API's words."""

    STARTED = "execution.started"
    COMPLETED = "execution.completed"
    FAILED = "execution.failed"
    PENDING_APPROVAL = "execution.pending_approval"
    CANCELLED = "execution.cancelled"  # ours, and only told where it was asked for


class KeyScope(StrEnum):
    """What an API key opens."""

    APP = "app"  # /api/happyrobot/* and /api/events, and browser tokens for them
    PUBLIC = "public"  # the Public API, for a customer's website
    ADMIN = "admin"  # what an operator may do: all that an app may, and what looks after the installation


metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s",
        "ix": "idx_%(table_name)s_%(column_0_N_name)s",
    }
)


def _created_at() -> Column[object]:
    return Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now())


# The guide's table, under the guide's names. Every further column has a default or may be empty, so that an
# INSERT that knows only the guide's columns works.
agent_runs = Table(
    "agent_runs",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("run_id", String(255), nullable=False, unique=True),
    Column("context_id", String(255), nullable=False),
    Column("name", String(255)),
    Column("description", Text),
    Column("status", String(50), nullable=False, server_default=RunStatus.PENDING),
    # `result` and `error` live here, and whatever else a foreign INSERT put in. Logs are rows of `run_events`.
    Column("metadata", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    _created_at(),
    # When the run itself last changed. Its last sign of life is its newest event.
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("workflow_id", String(255), nullable=False, server_default="default"),
    Column("execution_id", Uuid),
    Column("completed_at", DateTime(timezone=True)),
    # FAILED by our own timeout: a guess, which HappyRobot's word replaces.
    Column("timed_out", Boolean, nullable=False, server_default=false()),
    # When HappyRobot, asked, last said where the run stands. What it says is an event only if it moves the run.
    Column("heard_at", DateTime(timezone=True)),
    CheckConstraint(f"status IN ({', '.join(repr(str(status)) for status in RunStatus)})", name="status_known"),
    # A move of a run writes to each of them, for `status` stands in two. What they share is that the newest runs are
    # listed first, whatever the list is narrowed to, and that they lie together.
    Index("idx_agent_runs_context", "context_id", "created_at", "id"),
    Index("idx_agent_runs_status", "status", "created_at", "id"),
    Index("idx_agent_runs_workflow", "workflow_id", "created_at", "id"),
    # With what is counted, so that statistics need not look at the rows.
    Index(
        "idx_agent_runs_newest",
        "created_at",
        "id",
        postgresql_include=["workflow_id", "status", "completed_at"],
    ),
    Index("idx_agent_runs_execution", "execution_id"),
    # The few that HappyRobot is still asked about.
    Index("idx_agent_runs_timed_out", "updated_at", postgresql_where=text("timed_out")),
    # `heard_at` changes often, and no index knows of it: where its page has room, the row alone is written.
    postgresql_with={
        "autovacuum_vacuum_scale_factor": 0.01,
        "autovacuum_vacuum_insert_scale_factor": 0.01,
        "fillfactor": 85,
    },
)

# Its object, even where a foreign INSERT has stored other JSON.
RUN_METADATA = type_coerce(
    case(
        (func.jsonb_typeof(agent_runs.c.metadata) == "object", agent_runs.c.metadata),
        else_=literal_column("'{}'::jsonb"),
    ),
    JSONB,
)

# One request to start a workflow, stored before HappyRobot is called.
executions = Table(
    "executions",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("workflow_id", String(255), nullable=False),
    Column("context_id", String(255), nullable=False),
    Column("name", String(255)),
    Column("description", Text),
    Column("status", String(50), nullable=False, server_default=ExecutionStatus.PENDING),
    Column("input", JSONB, nullable=False),
    Column("error", Text),
    _created_at(),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("completed_at", DateTime(timezone=True)),
    # What the caller sent as `Idempotency-Key`: the same one of the same owner is the same execution.
    Column("idempotency_key", String(255)),
    Column("owner", String(255), nullable=False, server_default=""),
    # Whose API key it was, also where a browser came with a token of it.
    Column("key_id", Uuid),
    # The process that places the call knows what became of it by then, or is gone. Empty while nobody has begun to.
    Column("answer_by", DateTime(timezone=True), server_default=func.now()),
    # When HappyRobot first named a run of it.
    Column("began_at", DateTime(timezone=True)),
    # Pending while there is anything to decide, else the last decision.
    Column("approval_status", String(50)),
    # HappyRobot named no runs. Those whose callbacks name this execution are its runs.
    Column("unconfirmed", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("owner", "idempotency_key", name="executions_owner_idempotency_key_key"),
    Index("idx_executions_status", "status", "created_at"),
    # For those who see some contexts or workflows alone.
    Index("idx_executions_context", "context_id"),
    Index("idx_executions_workflow", "workflow_id"),
    postgresql_with={"fillfactor": 85},
)

# What runs have asked to have approved. Each is decided once.
approvals = Table(
    "approvals",
    metadata,
    Column("id", Uuid, primary_key=True, server_default=func.gen_random_uuid()),
    # Its place among others of its execution.
    Column("number", BigInteger, Identity(), nullable=False, unique=True),
    Column("execution_id", Uuid, nullable=False),
    Column("run_id", String(255), nullable=False),
    Column("status", String(50), nullable=False, server_default=ApprovalStatus.PENDING),
    # What is to be decided about, as HappyRobot sent it.
    Column("data", JSON(none_as_null=True)),
    Column("require_comment", Boolean, nullable=False, server_default=false()),
    # The same for every copy of it.
    Column("fingerprint", Uuid, nullable=False),
    # Where the decision goes, if the request says so; forgotten when it is there, for whoever knows it can decide.
    Column("resume_url", Text),
    Column("comment", Text),
    # Whose API key decided.
    Column("decided_by", Uuid),
    _created_at(),
    # When somebody first looked at it.
    Column("shown_at", DateTime(timezone=True)),
    Column("decided_at", DateTime(timezone=True)),
    # When HappyRobot took the decision.
    Column("told_at", DateTime(timezone=True)),
    CheckConstraint(f"status IN ({', '.join(repr(str(status)) for status in ApprovalStatus)})", name="status_known"),
    Index("idx_approvals_execution", "execution_id", "number"),
    Index("idx_approvals_run", "run_id"),
    Index("idx_approvals_pending", "run_id", postgresql_where=text("status = 'pending'")),
)

# What happened, in the order in which readers may see it: ids grow in the order of commits (see runs/ingest.py).
# No foreign key to the run: its check would lock and rewrite the run's row with every event.
run_events = Table(
    "run_events",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("run_id", String(255), nullable=False),
    Column("context_id", String(255), nullable=False),
    Column("workflow_id", String(255), nullable=False, server_default="default"),
    Column("event_type", String(255), nullable=False),
    # The run's status once this event had been taken in.
    Column("status", String(50), nullable=False),
    # `json` and not `jsonb`: nobody searches in it, and what HappyRobot sent comes back as it was written.
    Column("data", JSON(none_as_null=True)),
    Column("occurred_at", DateTime(timezone=True)),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("dedupe_key", Uuid),
    Index("idx_run_events_run", "run_id", "id"),
    Index("idx_run_events_context", "context_id", "id"),
    # The key is drawn at random, from the run's id among others. Beside it copies are looked for where the run's
    # events are, and not all over an index which no cache holds.
    Index(
        "idx_run_events_dedupe",
        "run_id",
        "dedupe_key",
        unique=True,
        postgresql_where=text("dedupe_key IS NOT NULL"),
    ),
)

# One row: which installation this database belongs to.
installation = Table(
    "installation",
    metadata,
    Column("id", Uuid, primary_key=True, server_default=func.gen_random_uuid()),
    _created_at(),
)

# Callbacks of runs that are not known yet; claimed when the run's row is written, dropped after a day.
held_callbacks = Table(
    "held_callbacks",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("run_id", String(255), nullable=False),
    Column("execution_id", String(255)),
    Column("event_type", String(255), nullable=False),
    # What it says about the run, if anything.
    Column("status", String(50)),
    Column("data", JSON(none_as_null=True)),
    Column("occurred_at", DateTime(timezone=True)),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("dedupe_key", Uuid, unique=True),
    # Whether it is a reason to ask HappyRobot at once.
    Column("session_ended", Boolean, nullable=False, server_default=false()),
    # Where the decision goes, of a request for approval.
    Column("resume_url", Text),
    Index("idx_held_callbacks_run", "run_id", "id"),
    Index("idx_held_callbacks_execution", "execution_id"),
    Index("idx_held_callbacks_created", "created_at"),
)

# HappyRobot's own record of a run that is over, as we show it: kept, because HappyRobot does not keep it for ever.
run_records = Table(
    "run_records",
    metadata,
    Column("run_id", String(255), primary_key=True),
    Column("record", JSON, nullable=False),
    _created_at(),
)

# The workflows that may be started, but for `default`, which comes from the environment.
workflows = Table(
    "workflows",
    metadata,
    Column("id", String(255), primary_key=True),
    Column("name", String(255)),
    Column("hook_url", Text, nullable=False),
    # Sealed with a key derived from `APP_SECRET`.
    Column("hook_key", Text),
    Column("environment", String(50), nullable=False, server_default="production"),
    # Where an approval's decision goes, if the request does not say.
    Column("approval_url", Text),
    # The workflow's place in links to the platform.
    Column("org_slug", String(255)),
    Column("platform_id", String(255)),
    Column("active", Boolean, nullable=False, server_default=true()),
    _created_at(),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

# Who may ask. What an API key itself is, only its owner has.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Uuid, primary_key=True, server_default=func.gen_random_uuid()),
    Column("name", String(255), nullable=False),
    Column("scopes", ARRAY(String(50)), nullable=False),
    # The workflows that it may start, and whose runs it sees; all where it is empty.
    Column("workflows", ARRAY(String(255))),
    Column("active", Boolean, nullable=False, server_default=true()),
    Column("expires_at", DateTime(timezone=True)),
    # Executions in a calendar month (UTC); any number where it is empty.
    Column("monthly_limit", Integer),
    # Requests to the Public API: so many at once, and so many a minute; the usual ones where they are empty.
    Column("burst", Integer),
    Column("per_minute", Integer),
    # Where executions of this key are reported; nowhere if it is empty.
    Column("webhook_url", Text),
    Column("webhook_events", ARRAY(String(50))),
    # What reports are signed with, sealed; and the one before it, for a while.
    Column("webhook_secret", Text),
    Column("webhook_secret_before", Text),
    Column("webhook_secret_before_until", DateTime(timezone=True)),
    # To the minute: not every request writes.
    Column("last_used_at", DateTime(timezone=True)),
    _created_at(),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    CheckConstraint(
        f"scopes <@ ARRAY[{', '.join(repr(str(scope)) for scope in KeyScope)}]::varchar[] AND cardinality(scopes) > 0",
        name="scopes_known",
    ),
    CheckConstraint("monthly_limit > 0", name="monthly_limit_positive"),
    CheckConstraint("burst > 0 AND per_minute > 0", name="rate_positive"),
    CheckConstraint("webhook_url IS NULL OR webhook_secret IS NOT NULL", name="webhook_signed"),
)

# What a request must bring to be taken for one of an API key: the SHA-256 of its 64 characters. A key that is rotated
# has several for a while.
api_key_digests = Table(
    "api_key_digests",
    metadata,
    Column("digest", LargeBinary(32), primary_key=True),
    Column("key_id", Uuid, ForeignKey("api_keys.id", ondelete="CASCADE"), nullable=False),
    # The end of the grace that it has since another took its place.
    Column("expires_at", DateTime(timezone=True)),
    _created_at(),
    Index("idx_api_key_digests_key", "key_id"),
)

# How many executions an API key has had in a month. Counted, and not looked up: a limit must hold for those who come at
# the same instant.
api_key_usage = Table(
    "api_key_usage",
    metadata,
    Column("key_id", Uuid, ForeignKey("api_keys.id", ondelete="CASCADE"), primary_key=True),
    # Its first day.
    Column("month", Date, primary_key=True),
    Column("executions", Integer, nullable=False),
)

# What customers are told, written with the change that it tells of.
deliveries = Table(
    "deliveries",
    metadata,
    # The same for each attempt, so that receivers recognise copies.
    Column("id", Uuid, primary_key=True, server_default=func.gen_random_uuid()),
    Column("number", BigInteger, Identity(), nullable=False, unique=True),
    Column("key_id", Uuid, ForeignKey("api_keys.id", ondelete="CASCADE"), nullable=False),
    Column("execution_id", Uuid, nullable=False),
    Column("event", String(50), nullable=False),
    # The bytes that are sent and signed, each time the same.
    Column("body", LargeBinary, nullable=False),
    Column("status", String(50), nullable=False, server_default=DeliveryStatus.PENDING),
    # Of those since it was written, or since somebody asked for it again.
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("due_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    # Somebody is sending it, and is done or gone by then.
    Column("claimed_until", DateTime(timezone=True)),
    _created_at(),
    Column("finished_at", DateTime(timezone=True)),
    CheckConstraint(f"status IN ({', '.join(repr(str(status)) for status in DeliveryStatus)})", name="status_known"),
    Index("idx_deliveries_key", "key_id", "number"),
    Index("idx_deliveries_execution", "execution_id"),
    Index("idx_deliveries_pending", "key_id", "due_at", postgresql_where=text("status = 'pending'")),
    Index("idx_deliveries_failed", "number", postgresql_where=text("status = 'failed'")),
    postgresql_with={"fillfactor": 85},
)

# What came of each attempt to send one.
delivery_attempts = Table(
    "delivery_attempts",
    metadata,
    Column("delivery_id", Uuid, ForeignKey("deliveries.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("started_at", DateTime(timezone=True), nullable=False),
    Column("duration_ms", Integer, nullable=False),
    # Of the answer, and how it began; empty where there was none.
    Column("status_code", Integer),
    Column("response", Text),
    # Why it failed, if it did.
    Column("error", Text),
)

SEALED = (
    workflows.c.hook_key,
    api_keys.c.webhook_secret,
    api_keys.c.webhook_secret_before,
)
"""The columns that hold secrets which are sealed with a key derived from `APP_SECRET`."""
