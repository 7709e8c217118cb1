"""Every setting, read once from the environment (or a `.env` file) into one frozen object."""

import re
from ipaddress import ip_network
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from fastapi import Depends
from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from starlette.requests import HTTPConnection

_SCHEMES = {
    "database_url": ("postgresql://", "postgres://", "postgresql+asyncpg://"),
    "redis_url": ("redis://", "rediss://", "unix://"),
}

_SHORTEST_SECRET = 32

Seconds = Annotated[float, Field(gt=0, le=86_400)]

_PRIVATE_NETWORKS = (
    "127.0.0.0/8",
    "::1/128",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "fc00::/7",
)


def http_address(value: str) -> str:
    """An address that requests can be sent to. Raises ValueError, which does not repeat it: it may hold a secret."""
    address = value.strip()
    if not re.fullmatch(r"[^\x00-\x20\x7f]+", address):
        raise ValueError("must not contain spaces or control characters")
    try:
        parts = urlsplit(address)
        well_formed = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        well_formed = False
    if not well_formed:
        raise ValueError("must be an http:// or https:// address")
    if "@" in parts.netloc:
        raise ValueError("must not contain a user or a password")
    return address


class Settings(BaseSettings):
    """What the environment says; an empty variable counts as one that is not set."""

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    # HappyRobot. The names are those of its integration guide.

    happyrobot_webhook_url: str | None = Field(
        None,
        description="Hook that starts the workflow `default`. Without it, in development, runs go to the simulator.",
    )
    happyrobot_x_api_key: SecretStr | None = Field(None, description="Key of that hook, sent to it as `X-API-KEY`.")
    happyrobot_api_key: SecretStr | None = Field(
        None, description="Key of the Platform API. Without it, statuses come from callbacks alone."
    )
    happyrobot_org_id: str | None = Field(
        None, description="Organisation to ask the Platform API for, if the key knows several."
    )
    happyrobot_org_slug: str | None = Field(None, description="Organisation's name in links to the platform.")
    happyrobot_workflow_id: str | None = Field(None, description="Workflow's id in links to the platform.")
    happyrobot_callback_key: SecretStr | None = Field(
        None, description="Key that callbacks must carry as `X-API-KEY`; `HAPPYROBOT_X_API_KEY` unless set."
    )
    happyrobot_api_url: str = Field(
        "https://platform.happyrobot.ai/api/v1",
        description="Platform API. In the EU: `https://platform.eu.happyrobot.ai/api/v1`.",
    )
    happyrobot_trigger_timeout: Seconds = Field(30, description="Seconds that a hook may take to answer a trigger.")
    happyrobot_api_pace: Annotated[float, Field(gt=0, le=1000)] = Field(
        8, description="Requests a second to the Platform API, all replicas together."
    )
    happyrobot_resume_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="More hosts to which an approval's decision may be sent, separated by commas."
    )

    # The service.

    environment: Literal["development", "production"] = Field(
        "development", description="`production` refuses to start while anything about it is unsafe."
    )
    app_url: str | None = Field(
        None,
        description="Public address of this service, for callbacks; its own address on loopback unless set.",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="Port to listen on.")
    database_url: SecretStr | None = Field(
        None, description="PostgreSQL, as libpq writes it. Without it, in development, an embedded server."
    )
    redis_url: SecretStr | None = Field(
        None, description="Redis or Valkey. Without it, in development, an embedded server."
    )
    switchboard_data_dir: str = Field(".switchboard", description="Folder of the embedded servers' data.")
    allow_anonymous: bool | None = Field(
        None,
        description="Whether the API answers without credentials: yes in development, no in production, unless set.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins of frontends on other hosts, separated by commas."
    )
    app_secret: SecretStr | None = Field(
        None,
        description="Encrypts stored secrets, signs browser tokens; 32 characters or more. In development a random one "
        "is kept in the data folder.",
    )
    app_secret_previous: SecretStr | None = Field(
        None, description="An older `APP_SECRET` that still opens what it sealed."
    )
    reconcile_after: Seconds = Field(
        15, description="Seconds after a run's last sign of life until HappyRobot is asked about it."
    )
    stale_after: Seconds = Field(
        1800, description="Seconds of silence, also from HappyRobot, after which a run counts as timed out."
    )
    allow_private_webhooks: bool = Field(
        False, description="Lets customers' webhooks reach private addresses (development, tests)."
    )
    retention_days: Annotated[int, Field(gt=0, le=36_500)] | None = Field(
        None, description="Days that finished runs and their events are kept; for ever unless set."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is worth a line.")

    # Limits on everybody.

    max_body_size: Annotated[int, Field(ge=1_000, le=100_000_000)] = Field(
        1_000_000, description="Bytes; a body of this size or more is refused."
    )
    max_header_size: Annotated[int, Field(ge=1_000, le=1_000_000)] = Field(
        32_768, description="Bytes that a request's line and headers may take together."
    )
    request_timeout: Seconds = Field(
        30, description="Seconds in which a request's head must have arrived, and again its body."
    )
    streams_per_key: Annotated[int, Field(gt=0)] = Field(
        10_000, description="Open streams of one API key, its browser tokens included, in one process."
    )
    streams_per_address: Annotated[int, Field(gt=0)] = Field(
        200, description="Open streams to one address in one process; this machine's own addresses are not counted."
    )
    failed_logins_per_minute: Annotated[int, Field(gt=0)] = Field(
        60, description="Wrong credentials from one address in a minute, all replicas together."
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        _PRIVATE_NETWORKS,
        description="Addresses and networks whose `X-Forwarded-For` is believed, separated by commas; those that are "
        "not reached from the internet unless set.",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _complain_once(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Says at once what is malformed and what is unsafe, so that nobody has to start twice to learn it."""
        complaints: list[InitErrorDetails] = []
        try:
            settings = validate(values)
        except ValidationError as error:
            malformed = {each["loc"][0] for each in error.errors() if each["loc"]}
            complaints = [_complaint(str(each["loc"][0]), each["msg"]) for each in error.errors() if each["loc"]]
            try:
                settings = validate({name: value for name, value in values.items() if name not in malformed})
            except ValidationError:
                raise error from None
        # Nothing is said about what cannot be judged for that.
        named = {each["loc"][0] for each in complaints}
        complaints += [
            each
            for each in _complaints(settings)
            if each["loc"][0] not in named and _JUDGED_BY.get(str(each["loc"][0])) not in named
        ]
        if complaints:
            raise ValidationError.from_exception_data(cls.__name__, complaints, hide_input=True)
        return settings

    @field_validator("happyrobot_resume_hosts", "cors_origins", "trusted_proxies", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("happyrobot_webhook_url", "happyrobot_api_url", "app_url")
    @classmethod
    def _require_http(cls, value: str | None) -> str | None:
        return None if value is None else http_address(value)

    @field_validator("happyrobot_api_url", "app_url")
    @classmethod
    def _drop_last_slash(cls, value: str | None) -> str | None:
        return None if value is None else value.rstrip("/")

    @field_validator("cors_origins")
    @classmethod
    def _require_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_origin, value))

    @field_validator("trusted_proxies")
    @classmethod
    def _require_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ip_network(each)) for each in value)

    @field_validator("database_url", "redis_url")
    @classmethod
    def _require_scheme(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        schemes = _SCHEMES[info.field_name or ""]
        if value is not None and not value.get_secret_value().startswith(schemes):
            raise ValueError(f"must start with {' or '.join(schemes)}")
        try:
            urlsplit("" if value is None else value.get_secret_value()).port  # noqa: B018  # it is read here
        except ValueError:
            raise ValueError("cannot be read; what is odd in a password must be written as %XX") from None
        return value

    @field_validator("happyrobot_x_api_key", "happyrobot_api_key", "happyrobot_callback_key")
    @classmethod
    def _require_what_a_header_can_carry(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
            raise ValueError("must be printable ASCII without spaces")
        return value

    @field_validator("app_secret", "app_secret_previous")
    @classmethod
    def _require_length(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < _SHORTEST_SECRET:
            raise ValueError(f"must have {_SHORTEST_SECRET} characters or more")
        return value

    @property
    def callback_key(self) -> SecretStr | None:
        """The key that HappyRobot must send with its callbacks, if any."""
        return self.happyrobot_callback_key or self.happyrobot_x_api_key

    @property
    def anonymous_allowed(self) -> bool:
        """Whether requests without credentials are answered."""
        return self.environment == "development" if self.allow_anonymous is None else self.allow_anonymous

    @property
    def callback_url(self) -> str:
        """Where HappyRobot is told to send its callbacks."""
        return f"{self.app_url or f'http://127.0.0.1:{self.port}'}/api/webhooks/happyrobot"


def _origin(value: str) -> str:
    """An origin as browsers write it. Raises ValueError for anything else."""
    parts = urlsplit(http_address(value))
    if value.strip().rstrip("/").lower() != f"{parts.scheme}://{parts.netloc}".lower():
        raise ValueError("must be origins such as https://app.example.com")
    try:
        host = (parts.hostname or "").encode("idna").decode()
    except UnicodeError:
        raise ValueError("must be origins such as https://app.example.com") from None
    default = {"http": 80, "https": 443}[parts.scheme]
    port = "" if parts.port in (None, default) else f":{parts.port}"
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}"


def _complaint(name: str, message: str) -> InitErrorDetails:
    # Not a template: what it says is said as it stands.
    said = {"message": message.removeprefix("Value error, ")}
    return InitErrorDetails(type=PydanticCustomError("setting", "{message}", said), loc=(name,), input=None)


_JUDGED_BY = {"happyrobot_callback_key": "happyrobot_x_api_key", "stale_after": "reconcile_after"}


def _complaints(settings: Settings) -> list[InitErrorDetails]:
    """What does not fit together, what nobody would want in production, and what to set instead."""
    complaints = []
    if settings.stale_after <= settings.reconcile_after:
        complaints.append(_complaint("stale_after", "must be more than RECONCILE_AFTER"))
    if settings.environment == "production":
        complaints += [
            _complaint(name, f"{reason} (ENVIRONMENT=production)") for name, reason in _unsafe(settings).items()
        ]
    return complaints


def _in_the_clear(address: str | None) -> bool:
    """Whether what is sent there crosses a network unencrypted."""
    parts = urlsplit(address or "")
    return parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1")


def _unsafe(settings: Settings) -> dict[str, str]:
    reasons = {}
    if settings.database_url is None:
        reasons["database_url"] = "must be set; the embedded PostgreSQL is for development"
    if settings.redis_url is None:
        reasons["redis_url"] = "must be set; the embedded Valkey is for development"
    if settings.happyrobot_webhook_url is None:
        reasons["happyrobot_webhook_url"] = "must be set; the simulator is for development"
    for name in ("happyrobot_webhook_url", "happyrobot_api_url"):
        if _in_the_clear(getattr(settings, name)):
            reasons[name] = "must be an https:// address; keys and phone numbers are sent there"
    if settings.callback_key is None:
        reasons["happyrobot_callback_key"] = "must be set, or HAPPYROBOT_X_API_KEY; else anybody could send callbacks"
    if settings.app_secret is None:
        reasons["app_secret"] = f"must be set, to {_SHORTEST_SECRET} characters or more: `openssl rand -hex 32`"
    if settings.app_url is None or not settings.app_url.startswith("https://"):
        reasons["app_url"] = "must be set to this service's public https:// address"
    if settings.allow_private_webhooks:
        reasons["allow_private_webhooks"] = "must not be true; customers could reach into your network"
    return reasons


async def _settings(connection: HTTPConnection) -> Settings:
    settings: Settings = connection.state.settings
    return settings


CurrentSettings = Annotated[Settings, Depends(_settings)]
