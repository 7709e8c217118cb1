"""What is said in a simulated call: a broker's agent offers a load to a carrier."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["completed", "failed", "canceled"]
Role = Literal["assistant", "user"]

PENDING_APPROVAL = "pending_approval"  # the event with which a call asks for a decision

SPEAKERS: dict[Role, str] = {"assistant": "Agent", "user": "Carrier"}
WORDS_A_SECOND = 2.5  # an unhurried phone voice
HIGHEST_RATE = 1_000_000


@dataclass(frozen=True, slots=True)
class Line:
    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happens in the call; each becomes one callback."""

    event_type: str
    data: dict[str, Any] = field(default_factory=dict)
    line: Line | None = None


@dataclass(frozen=True, slots=True)
class Approval:
    """What a call asks for before its second half."""

    require_comment: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """What the call is about, as far as the payload says."""

    reference: str
    carrier: str
    origin: str
    destination: str
    pickup: str
    weight: str
    mc_number: str
    offered: int

    @property
    def asked(self) -> int:
        return self.offered + 150

    @property
    def agreed(self) -> int:
        return self.offered + 75

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> "Load":
        def text(*names: str, default: str) -> str:
            for name in names:
                value = payload.get(name)
                if isinstance(value, str | int | float) and str(value).strip():
                    return str(value).strip()
            return default

        return cls(
            reference=text("load_id", "reference", default="LD-48213"),
            carrier=text("customer_name", "carrier_name", default="Prairie Star Transport"),
            origin=text("origin", default="Joliet, Illinois"),
            destination=text("destination", default="Dallas, Texas"),
            pickup=text("pickup_time", "pickup", default="tomorrow at 8 in the morning"),
            weight=text("weight", default="38,400"),
            mc_number=text("mc_number", default="704118"),
            offered=_dollars(payload.get("rate"), default=1850),
        )


def tell(payload: Mapping[str, Any], outcome: Outcome, approval: Approval | None) -> list[Step]:
    """The call from its first ring to its end. One that does not complete breaks off half-way.

    An approval is asked for in the middle of what is said: in a call that completes, before the agent agrees to the
    carrier's rate.
    """
    load = Load.of(payload)
    lines = conversation(load)
    if outcome != "completed":
        lines = lines[: len(lines) // 2]
    logs = [Step("log", {"message": f"{SPEAKERS[line.role]}: {line.text}", "role": line.role}, line) for line in lines]
    if approval is not None:
        logs.insert(-(-len(logs) // 2), asking(payload, load, approval))
    return [Step("running"), *logs, ending(load, outcome, spoken_seconds(lines))]


def conversation(load: Load) -> list[Line]:
    def agent(text: str) -> Line:
        return Line("assistant", text)

    def carrier(text: str) -> Line:
        return Line("user", text)

    return [
        agent(f"Hi, this is Riley at Northbend Brokerage about load {load.reference}. Is this {load.carrier}?"),
        carrier("It is, you have dispatch. Go ahead."),
        agent(f"It's a dry van from {load.origin} to {load.destination}, picking up {load.pickup}."),
        carrier("I may have a truck for that. How heavy is it?"),
        agent(f"{load.weight} pounds, no touch, and it pays ${load.offered:,} all in."),
        carrier(f"That's light for the lane. I'd have to see ${load.asked:,}."),
        agent(f"I hear you. I can do ${load.agreed:,}, with detention paid after two hours."),
        carrier(f"All right, ${load.agreed:,} works. Put us on it."),
        agent("Great. What MC number should I book it under?"),
        carrier(f"MC {load.mc_number}."),
        agent("Thank you, that checks out. The rate confirmation is on its way to your inbox. Drive safe!"),
    ]


def asking(payload: Mapping[str, Any], load: Load, approval: Approval) -> Step:
    """What somebody is to look through: a message for each row of the payload's `csvData`, or else the rate."""
    match payload.get("csvData"):
        case [_, *_] as people if all(isinstance(person, dict) for person in people):
            title, description = "Review the messages", "One for each recipient; they are sent once approved."
            rows = [person | {"generated_content": invitation(person, load)} for person in people]
        case _:
            title = f"Review the rate for load {load.reference}"
            description = f"{load.carrier} asks for more than the ${load.offered:,} offered."
            content = f"${load.agreed:,} all in, with detention paid after two hours."
            facts = {"reference": load.reference, "carrier": load.carrier, "agreed_rate": load.agreed}
            rows = [facts | {"generated_content": content}]
    rows = [row | {"compliance_status": "passed"} for row in rows]
    metadata = {
        "totalRows": len(rows),
        "title": title,
        "description": description,
        "allowBulkApproval": True,
        "requireComment": approval.require_comment,
    }
    fields = list(dict.fromkeys(name for row in rows for name in row))
    return Step(PENDING_APPROVAL, {"rows": rows, "metadata": metadata, "displayFields": fields})


def invitation(person: Mapping[str, Any], load: Load) -> str:
    return f"Hello {person.get('name') or 'there'}, can you run {load.origin} to {load.destination}, {load.pickup}?"


def ending(load: Load, outcome: Outcome, seconds: int) -> Step:
    match outcome:
        case "completed":
            result: dict[str, Any] = {
                "outcome": "load_booked",
                "summary": f"{load.carrier} took load {load.reference} for ${load.agreed:,}.",
                "load_id": load.reference,
                "carrier": load.carrier,
                "mc_number": load.mc_number,
                "origin": load.origin,
                "destination": load.destination,
                "offered_rate": load.offered,
                "agreed_rate": load.agreed,
                "currency": "USD",
            }
        case "failed":
            result = {"error": "The line dropped before a rate was agreed", "reason": "call_dropped"}
        case _:
            result = {"reason": "canceled_by_workflow"}
    return Step(outcome, result | {"duration_seconds": seconds})


def spoken_seconds(lines: Sequence[Line]) -> int:
    return round(sum(len(line.text.split()) for line in lines) / WORDS_A_SECOND)


def _dollars(value: object, *, default: int) -> int:
    try:
        amount = float(str(value).replace("$", "").replace(",", ""))
    except ValueError:
        return default
    return round(amount) if math.isfinite(amount) and 0 < amount <= HIGHEST_RATE else default
