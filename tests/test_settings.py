"""The environment, read into settings."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from switchboard import database
from switchboard.app import create_app
from switchboard.settings import Settings

ROOT = Path(__file__).parents[1]
PRODUCTION: dict[str, Any] = {
    "environment": "production",
    "database_url": "postgresql://db/x",
    "redis_url": "redis://cache",
    "happyrobot_webhook_url": "https://workflows.platform.happyrobot.ai/hooks/x",
    "happyrobot_x_api_key": "k",
    "app_url": "https://calls.example.com",
    "app_secret": "s" * 32,
}


def test_every_setting_is_in_the_example_and_in_the_readme():
    names = {name.upper() for name in Settings.model_fields}
    example = (ROOT / ".env.example").read_text()
    assert set(re.findall(r"^#? ?([A-Z][A-Z0-9_]+)=", example, re.MULTILINE)) == names
    readme = (ROOT / "README.md").read_text()
    assert {name for name in names if f"`{name}`" in readme} == names


def test_every_setting_says_what_it_is_for():
    assert all(field.description for field in Settings.model_fields.values())


def test_the_example_can_be_used_as_it_is(monkeypatch: pytest.MonkeyPatch):
    assert Settings(_env_file=ROOT / ".env.example") == Settings()


def test_the_environment_is_read_and_empty_counts_as_unset(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CORS_ORIGINS", "https://a.example, https://b.example,")
    monkeypatch.setenv("HAPPYROBOT_API_KEY", "")
    monkeypatch.setenv("APP_URL", "https://calls.example.com/")
    monkeypatch.setenv("STALE_AFTER", "60")
    settings = Settings()
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert settings.happyrobot_api_key is None
    assert settings.callback_url == "https://calls.example.com/api/webhooks/happyrobot"
    assert settings.stale_after == 60


def test_settings_do_not_change_and_do_not_tell_secrets():
    settings = Settings(happyrobot_x_api_key="very-secret")
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]
    assert "very-secret" not in repr(settings)


def test_a_wrong_setting_is_named_and_its_value_kept_quiet():
    with pytest.raises(ValidationError) as error:
        Settings(happyrobot_webhook_url="ftp://user:very-secret@host/")
    assert "happyrobot_webhook_url" in str(error.value)
    assert "very-secret" not in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"port": -1},
        {"stale_after": 0},
        {"retention_days": 0},
        {"environment": "staging"},
        {"happyrobot_x_api_key": "schlüssel"},
        {"happyrobot_api_key": "a b"},
        {"database_url": "mysql://host/db"},
        {"redis_url": "host:6379"},
    ],
)
def test_nonsense_is_refused(wrong: dict[str, Any]):
    with pytest.raises(ValidationError):
        Settings(**wrong)


def test_the_callback_key_is_the_hooks_unless_set():
    one = Settings(happyrobot_x_api_key="hook").callback_key
    other = Settings(happyrobot_x_api_key="hook", happyrobot_callback_key="own").callback_key
    assert one is not None
    assert other is not None
    assert (one.get_secret_value(), other.get_secret_value()) == ("hook", "own")
    assert Settings().callback_key is None


def test_anonymous_requests_are_answered_in_development_only_unless_said_otherwise():
    assert Settings().anonymous_allowed
    assert not Settings(allow_anonymous=False).anonymous_allowed
    assert not Settings(**PRODUCTION).anonymous_allowed
    assert Settings(**PRODUCTION, allow_anonymous=True).anonymous_allowed


NEEDED = sorted(set(PRODUCTION) - {"environment"})


def complaints(**values: Any) -> dict[str, str]:
    """What is said about each setting that is refused."""
    with pytest.raises(ValidationError) as error:
        Settings(**values)
    return {str(each["loc"][0]): each["msg"] for each in error.value.errors()}


@pytest.mark.parametrize("missing", NEEDED)
def test_production_says_what_is_missing(missing: str):
    name = "happyrobot_callback_key" if missing == "happyrobot_x_api_key" else missing
    said = complaints(**{key: value for key, value in PRODUCTION.items() if key != missing})
    assert list(said) == [name]
    assert "must be set" in said[name]


@pytest.mark.parametrize(
    "unsafe",
    [
        {"app_url": "http://calls.example.com"},
        {"allow_private_webhooks": True},
        {"app_secret": "s" * 31},
        {"happyrobot_webhook_url": "http://hooks.example.com/x"},
        {"happyrobot_api_url": "http://api.example.com/api/v1"},
    ],
)
def test_production_says_what_is_unsafe(unsafe: dict[str, Any]):
    assert Settings(**PRODUCTION).environment == "production"
    assert complaints(**PRODUCTION | unsafe).keys() == unsafe.keys()


def test_production_can_be_tried_against_something_on_this_machine():
    Settings(**PRODUCTION | {"happyrobot_webhook_url": "http://127.0.0.1:8090/hooks/x"})


def test_production_names_everything_at_once_what_is_malformed_too():
    said = complaints(environment="production", app_secret="short", port=70000, stale_after=1)
    assert sorted(said) == sorted(
        ["port", "app_secret", "stale_after", "happyrobot_callback_key"]
        + [name for name in NEEDED if name not in ("happyrobot_x_api_key", "app_secret")]
    )
    assert said["app_secret"] == "must have 32 characters or more"


@pytest.mark.parametrize(
    "malformed",
    [{"happyrobot_x_api_key": "a b"}, {"reconcile_after": "soon"}, {"database_url": "postgresql://u:p:/x@h/d"}],
)
def test_what_is_malformed_is_complained_about_once(malformed: dict[str, Any]):
    values = PRODUCTION | {"stale_after": 16} | malformed
    assert complaints(**values).keys() == malformed.keys()


def test_a_password_that_breaks_its_address_is_not_repeated():
    said = complaints(database_url="postgresql://me:very/se:cret@host/db")["database_url"]
    assert said == "cannot be read; what is odd in a password must be written as %XX"


@pytest.mark.parametrize(
    "origins",
    [
        "*",
        "app.example.com",
        "https://a.example/path",
        "https://a.example?x",
        "https://a.example?",
        "https://a.example#x",
    ],
)
def test_only_origins_are_origins(origins: str):
    assert complaints(cors_origins=origins).keys() == {"cors_origins"}


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("https://App.example.com/", "https://app.example.com"),
        ("https://app.example.com:443", "https://app.example.com"),
        ("http://app.example.com:80", "http://app.example.com"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("http://[::1]:3000", "http://[::1]:3000"),
    ],
)
def test_origins_are_compared_as_browsers_write_them(given: str, written: str):
    assert Settings(cors_origins=given).cors_origins == (written,)


@pytest.mark.parametrize("proxies", ["10.0.0.1/8", "proxy.internal", "*"])
def test_only_networks_are_proxies(proxies: str):
    assert complaints(trusted_proxies=proxies).keys() == {"trusted_proxies"}


@pytest.mark.parametrize("name", ["app_secret", "app_secret_previous"])
def test_a_secret_that_can_be_guessed_is_refused(name: str):
    good: dict[str, Any] = {name: "s" * 32}
    Settings(**good)
    bad: dict[str, Any] = {name: "s" * 31}
    with pytest.raises(ValidationError, match="must have 32 characters or more"):
        Settings(**bad)


def test_nobody_is_given_up_before_being_asked_about():
    assert complaints(reconcile_after=60, stale_after=60) == {"stale_after": "must be more than RECONCILE_AFTER"}


def test_the_application_does_not_start_without_servers():
    with pytest.raises(ValueError, match="DATABASE_URL and REDIS_URL are needed"):
        create_app(Settings())


@pytest.mark.parametrize(
    ("url", "dsn"),
    [
        ("postgres://u:p@host:5433/db", "postgresql://u:p@host:5433/db"),
        ("postgresql+asyncpg://u:p@host/db", "postgresql://u:p@host/db"),
        ("postgresql://u@host/db?sslmode=require", "postgresql://u@host/db?sslmode=require"),
        ("postgresql://u@/db?host=/var/run/pg&port=5432", "postgresql://u@/db?host=%2Fvar%2Frun%2Fpg&port=5432"),
        ("postgresql://host/db?pgbouncer=true&connection_limit=1&schema=public", "postgresql://host/db"),
        (
            "postgresql://host/db?channel_binding=require&sslmode=verify-full",
            "postgresql://host/db?sslmode=verify-full",
        ),
    ],
)
def test_database_urls_of_every_kind_are_understood(url: str, dsn: str):
    assert database.dsn(url) == dsn
