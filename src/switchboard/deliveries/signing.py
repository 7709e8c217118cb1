"""What stands in the headers of a webhook, by which its receiver knows that it is ours: pure."""

import base64
import hashlib
import hmac
from collections.abc import Sequence
from uuid import UUID

from switchboard.access.webhooks import PREFIX


def headers(
    secrets: Sequence[str], *, event: str, execution_id: UUID, delivery_id: UUID, timestamp: int, body: bytes
) -> dict[str, str]:
    """The headers of one attempt: the Public API's, and those of Standard Webhooks beside them.

    `timestamp` is when it is sent, in seconds since 1970. Of two secrets the current one comes first.
    """
    found = {
        "Content-Type": "application/json",
        "User-Agent": "Workflow-Automation-Platform/1.0",
        "X-Webhook-Event": event,
        "X-Webhook-Execution-Id": str(execution_id),
        "webhook-id": str(delivery_id),
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(_standard(each, delivery_id, timestamp, body) for each in secrets),
    }
    for name, secret in zip(("X-Webhook-Signature", "X-Webhook-Signature-Previous"), secrets, strict=False):
        found[name] = f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"
    return found


def _standard(secret: str, delivery_id: UUID, timestamp: int, body: bytes) -> str:
    signed = hmac.digest(_key(secret), f"{delivery_id}.{timestamp}.".encode() + body, "sha256")
    return f"v1,{base64.b64encode(signed).decode()}"


def _key(secret: str) -> bytes:
    """What a secret stands for: Base64 behind `whsec_`, else its own characters."""
    if secret.startswith(PREFIX):
        try:
            return base64.b64decode(secret.removeprefix(PREFIX), validate=True)
        except ValueError:
            pass
    return secret.encode()
