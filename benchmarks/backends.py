"""How each of those that are compared is started."""

import contextlib
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks import children, databases
from benchmarks.children import LOOPBACK
from benchmarks.rig import Rig
from benchmarks.titles import BASELINE, EMPTY, NCHAN, PEER, SWITCHBOARD
from switchboard.settings import Settings


@dataclass(frozen=True, slots=True)
class Backend:
    """One that is ready to be measured."""

    name: str
    url: str
    key: str
    pid: int | None = None
    database_url: str | None = None
    """Where its runs are."""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 80


def _surroundings(**more: str) -> dict[str, str]:
    """This process's environment, without what would tell Switchboard anything."""
    return children.environment(*map(str.upper, Settings.model_fields), **more)


def _happyrobot(rig: Rig, key: str) -> dict[str, str]:
    return {
        "HAPPYROBOT_WEBHOOK_URL": f"{rig.hook_url}/hooks/benchmarks",
        "HAPPYROBOT_X_API_KEY": key,
        "HAPPYROBOT_API_URL": rig.hook_url,
        "HAPPYROBOT_API_KEY": secrets.token_hex(16),
        "HAPPYROBOT_ORG_ID": "benchmarks",
    }


@contextlib.contextmanager
def switchboard(rig: Rig, name: str = SWITCHBOARD) -> Iterator[Backend]:
    """One process with its background work, as in production; HTTPS ends in front of it."""
    key, port = secrets.token_hex(16), children.free_port()
    with databases.database(rig.database_url) as url:
        surroundings = _surroundings(
            ENVIRONMENT="production",
            APP_URL="https://switchboard.example.com",
            APP_SECRET=secrets.token_hex(32),
            # The others ask nobody who they are, either.
            ALLOW_ANONYMOUS="true",
            LOG_LEVEL="info",
            DATABASE_URL=url,
            REDIS_URL=rig.redis_url,
            **_happyrobot(rig, key),
        )
        command = [sys.executable, "-P", "-m", "switchboard", "serve", "--port", str(port)]
        with _serving(rig, name, command, surroundings, port) as pid:
            yield Backend(name, f"http://{LOOPBACK}:{port}", key, pid, url)


@contextlib.contextmanager
def baseline(rig: Rig) -> Iterator[Backend]:
    key, port = secrets.token_hex(16), children.free_port()
    with databases.database(rig.database_url) as url:
        surroundings = _surroundings(
            APP_URL=f"http://{LOOPBACK}:{port}",
            DATABASE_URL=urlsplit(url)._replace(scheme="postgresql+asyncpg").geturl(),
            REDIS_URL=rig.redis_url,
            **_happyrobot(rig, key),
        )
        with _serving(rig, BASELINE, _uvicorn("benchmarks.baseline:app", port), surroundings, port) as pid:
            yield Backend(BASELINE, f"http://{LOOPBACK}:{port}", key, pid, url)


@contextlib.contextmanager
def empty(rig: Rig) -> Iterator[Backend]:
    port = children.free_port()
    with _serving(rig, EMPTY, _uvicorn("benchmarks.empty:app", port), children.environment(), port) as pid:
        yield Backend(EMPTY, f"http://{LOOPBACK}:{port}", "", pid)


@contextlib.contextmanager
def peer(rig: Rig) -> Iterator[Sequence[Backend]]:
    """The backend that somebody else has started, if one is given; the runs that we put into its database go again."""
    if rig.peer is None:
        yield ()
        return
    try:
        yield (Backend(PEER, rig.peer.url, rig.peer.key, None, rig.peer.database_url),)
    finally:
        databases.remove_runs(rig.peer.database_url, rig.names)


@contextlib.contextmanager
def nchan(rig: Rig) -> Iterator[Sequence[Backend]]:
    """nginx with nchan, if it is installed: it takes events where the others take callbacks, and stores nothing."""
    nginx, module = shutil.which("nginx") or shutil.which("/usr/sbin/nginx"), _nchan_module()
    if nginx is None or module is None:
        rig.say("nchan is not installed (Debian: nginx-light libnginx-mod-nchan); streams are not compared with it")
        yield ()
        return
    port, configuration = children.free_port(), rig.folder / "nginx.conf"
    configuration.write_text(_NGINX.format(module=module, port=port, folder=rig.folder))
    command = [nginx, "-c", str(configuration), "-e", str(rig.folder / "nginx.log")]
    with children.running(NCHAN, command, rig.folder, children.environment(), lambda: children.answers(port)) as pid:
        yield (Backend(NCHAN, f"http://{LOOPBACK}:{port}", "", pid),)


def _nchan_module() -> Path | None:
    return next(Path("/usr").glob("lib*/nginx/modules/ngx_nchan_module.so"), None)


_NGINX = """\
load_module {module};
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  keepalive_requests 1000000;
  client_body_temp_path {folder}/nginx-body;
  proxy_temp_path {folder}/nginx-proxy;
  fastcgi_temp_path {folder}/nginx-fastcgi;
  uwsgi_temp_path {folder}/nginx-uwsgi;
  scgi_temp_path {folder}/nginx-scgi;
  server {{
    listen 127.0.0.1:{port};
    location = /api/webhooks/happyrobot {{ nchan_publisher; nchan_channel_id events; nchan_message_timeout 10s; }}
    location = /api/events {{
      nchan_subscriber eventsource;
      nchan_channel_id events;
      nchan_subscriber_first_message newest;
    }}
  }}
}}
"""


def _uvicorn(app: str, port: int) -> list[str]:
    """One process, as quick as it gets: nothing is logged of a request."""
    return [
        *(sys.executable, "-P", "-m", "uvicorn", app, "--port", str(port)),
        *("--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"),
    ]


@contextlib.contextmanager
def _serving(rig: Rig, name: str, command: Sequence[str], surroundings: dict[str, str], port: int) -> Iterator[int]:
    log = name.lower().replace(" ", "-")
    with children.running(log, command, rig.folder, surroundings, lambda: children.answers(port)) as pid:
        yield pid
