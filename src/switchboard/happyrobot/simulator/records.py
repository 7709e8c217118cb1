"""A run as the Platform API describes it: v1 in two shapes, and v2."""

from typing import Any, Literal

from switchboard.happyrobot.simulator.run import Message, Run, Status, stable_id, stamp

Record = dict[str, Any]
Shape = Literal["nested", "flat"]

ORG_ID = stable_id("org")
AUTHOR_ID = stable_id("author")
PUBLISHED_AT = "2025-01-06T09:00:00.000Z"

V2_STATUS: dict[Status, str] = {
    "scheduled": "not_started",
    "running": "running",
    "completed": "succeeded",
    "failed": "failed",
    "canceled": "canceled",
}


def use_case_id(slug: str) -> str:
    return stable_id("use-case", slug)


def nested(run: Run) -> Record:
    """The documented example's shape."""
    head = summary(run)
    del head["completed_at"]
    return {
        "run": head,
        "sessions": [session | {"messages": messages(run), "node_outputs": []} for session in sessions(run)],
        "outputs": outputs(run),
        "issues": issues(run),
        "intermediates": [hook(run)],
        "version": version(run),
    }


def flat(run: Run) -> Record:
    """The shape of the current OpenAPI document: actions and sessions in one list of events."""
    calls = [
        {
            "type": "session",
            "id": session["id"],
            "duration": session["duration"],
            "actions": [],
            "messages": messages(run),
            "timestamp": session["timestamp"],
            **sip(run),
        }
        for session in sessions(run)
    ]
    events = [action(hook(run)), *calls, *map(action, outputs(run))]
    return summary(run) | {"events": events, "issues": issues(run), "version": version(run)}


def hook(run: Run) -> Record:
    """What the workflow's first node gave: the payload of the trigger."""
    return {
        "id": stable_id(run.id, "hook"),
        "run_id": run.id,
        "node_id": stable_id("node", run.slug, "hook"),
        "event_id": stable_id("event", "hook"),
        "session_id": None,
        "name": "Incoming hook",
        "data": run.payload,
        "error": None,
        "timestamp": stamp(run.created_at),
        "event": {"name": "Incoming hook", "integration": {"name": "Webhook"}},
    }


def action(output: Record) -> Record:
    """What a node gave, as the flat shape has it."""
    kept = ("id", "run_id", "node_id", "event_id", "session_id", "name", "data", "error", "timestamp")
    return {
        "type": "action",
        "timestamp": output["timestamp"],
        "integration_name": output["event"]["integration"]["name"],
        "event_name": output["event"]["name"],
        "intermediate": {name: output[name] for name in kept} | {"data_deleted": False},
        "output": output["data"],
        "node_id": output["node_id"],
    }


def summary(run: Run) -> Record:
    return {
        "id": run.id,
        "org_id": ORG_ID,
        "use_case_id": use_case_id(run.slug),
        "version_id": version(run)["id"],
        "status": run.status,
        "annotation": None,
        "timestamp": stamp(run.created_at),
        "completed_at": stamp(run.completed_at) if run.completed_at else None,
    }


def row(run: Run) -> Record:
    """One line of v1's list of runs."""
    return summary(run) | {"data": run.ending or {}}


def v2(run: Run) -> Record:
    return row(run) | {"status": V2_STATUS[run.status], "input_tokens": None, "output_tokens": None}


def sessions(run: Run) -> list[Record]:
    """The phone call, once there is one."""
    if run.started_at is None:
        return []
    status = run.status if run.over else "in-progress"
    return [
        {
            "id": run.session_id,
            "org_id": ORG_ID,
            "use_case_id": use_case_id(run.slug),
            "version_id": version(run)["id"],
            "run_id": run.id,
            "room_name": f"room-{run.session_id}",
            "agent_id": stable_id("agent", run.slug),
            "user_number": str(run.payload.get("customer_phone", "+13125550142")),
            "status": status,
            "type": "outbound",
            "duration": run.duration if run.over else None,
            "timestamp": stamp(run.started_at),
        }
    ]


def session_changed(run: Run) -> Record:
    """The CloudEvent that tells of the run's session as it stands: it has begun, or ended."""
    current, previous = (run.status, "in-progress") if run.over else ("in-progress", "queued")
    return {
        "specversion": "1.0",
        "id": stable_id(run.id, "cloudevent", current),
        "source": "https://platform.happyrobot.ai",
        "type": "session.status_changed",
        "time": stamp(run.clock),
        "datacontenttype": "application/json",
        "data": {
            "schema_version": "2025-07-08",
            "run_id": run.id,
            "session_id": run.session_id,
            "org": {"id": ORG_ID},
            "use_case": {"id": use_case_id(run.slug)},
            "status": {"previous": previous, "current": current, "updated_at": stamp(run.clock)},
        },
    }


def v2_sessions(run: Run) -> list[Record]:
    unknown = dict.fromkeys(("llm_model", "stt_model", "tts_model", "voice_id", "languages"))
    return [
        {name: value for name, value in session.items() if name not in ("room_name", "agent_id")}
        | {"call_connected_at": session["timestamp"], "failure_reason": failure(run), **sip(run), **unknown}
        for session in sessions(run)
    ]


def sip(run: Run) -> Record:
    code, reason = ("480", "Temporarily Unavailable") if run.status == "failed" else ("200", "OK")
    return {"sip_code": code, "sip_reason": reason} if run.over else {"sip_code": None, "sip_reason": None}


def failure(run: Run) -> str | None:
    return str(run.ending["reason"]) if run.status == "failed" and run.ending else None


def messages(run: Run) -> list[Record]:
    return [message(run, said) for said in run.messages]


def message(run: Run, said: Message) -> Record:
    return {
        "id": said.id,
        "session_id": run.session_id,
        "chat_session_id": None,
        "role": said.role,
        "content": said.content,
        "tool_calls": None,
        "name": None,
        "is_filler": False,
        "is_interrupted": False,
        "is_natural_cut": False,
        "latency_breakdown": None,
        "timestamp": stamp(said.at),
        "data_deleted": False,
    }


def v2_messages(run: Run) -> list[Record]:
    return [
        {
            "id": said.id,
            "session_id": run.session_id,
            "role": said.role,
            "status": None,
            "content": said.content,
            "timestamp": stamp(said.at),
            "is_filler": False,
            "is_interrupted": False,
            "tool_calls": None,
            "artifacts": None,
            "turn_index": turn,
        }
        for turn, said in enumerate(run.messages)
    ]


def outputs(run: Run) -> list[Record]:
    """What the workflow's nodes gave: one that reads the finished call."""
    if run.status != "completed" or run.completed_at is None:
        return []
    integration = {
        "id": stable_id("integration", "ai"),
        "name": "AI",
        "group": "core",
        "icon": None,
        "description": None,
        "docs_url": None,
        "website_url": None,
        "is_top": True,
        "requires_credentials": False,
        "agent_specific": False,
    }
    return [
        {
            "id": stable_id(run.id, "output"),
            "run_id": run.id,
            "node_id": stable_id("node", run.slug, "extract"),
            "event_id": stable_id("event", "extract"),
            "session_id": run.session_id,
            "chat_session_id": None,
            "name": "Extract call result",
            "data": run.ending,
            "is_multiple": False,
            "error": None,
            "timestamp": stamp(run.completed_at),
            "event": {
                "id": stable_id("event", "extract"),
                "name": "Extract",
                "integration_id": integration["id"],
                "type": 1,
                "description": None,
                "is_instant": False,
                "integration": integration,
            },
        }
    ]


def issues(run: Run) -> list[Record]:
    """A failed call is noted as an issue of its run."""
    if run.status != "failed" or run.completed_at is None or run.ending is None:
        return []
    return [
        {
            "id": stable_id(run.id, "issue"),
            "use_case_id": use_case_id(run.slug),
            "org_id": ORG_ID,
            "run_id": run.id,
            "run_version_id": version(run)["id"],
            "status": "open",
            "priority": "high",
            "created_at": stamp(run.completed_at),
            "type": "run",
            "updated_at": stamp(run.completed_at),
            "assignee": None,
            "created_by": AUTHOR_ID,
            "updated_by": AUTHOR_ID,
            "message_id": None,
            "correction": run.ending["error"],
            "correction_reason": run.ending["reason"],
            "northstar_id": None,
        }
    ]


def version(run: Run) -> Record:
    return {
        "id": stable_id("version", run.slug, run.environment),
        "slug": run.slug,
        "org_id": ORG_ID,
        "use_case_id": use_case_id(run.slug),
        "version_number": 1,
        "name": "Simulated carrier call",
        "is_published": True,
        "is_live": True,
        "environment": run.environment,
        "source_version_id": None,
        "timestamp": PUBLISHED_AT,
        "published_at": PUBLISHED_AT,
        "is_deleted": False,
        "description": None,
        "created_by": AUTHOR_ID,
    }
