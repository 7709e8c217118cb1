# Python 3.11 on Debian 13, for what builds and for what runs alike. The tag moves with security releases of both; pin it by
# digest where two builds must be the same.
FROM python:3.11-slim-trixie AS python

FROM python AS builder

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /build

# What changes seldom comes first. The environment is made where it will stay: it knows its own path.
COPY requirements.production.lock ./
RUN python -m venv --without-pip /opt/switchboard \
    && pip --python /opt/switchboard/bin/python install --no-compile --require-hashes -r requirements.production.lock

COPY requirements.build.lock ./
RUN pip install --require-hashes -r requirements.build.lock

COPY pyproject.toml README.md LICENSE ./
COPY migrations migrations
COPY src src
# Bytecode of hashes and not of times, so that the same sources make the same files; nobody changes sources in an image, so
# nobody checks.
RUN pip wheel --no-build-isolation --no-deps --wheel-dir dist . \
    && pip --python /opt/switchboard/bin/python install --no-compile --no-deps --no-index dist/*.whl \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/switchboard/lib


FROM python

LABEL org.opencontainers.image.title="Switchboard" \
      org.opencontainers.image.description="The backend between an application and HappyRobot's voice agents." \
      org.opencontainers.image.licenses="MIT"

# By number, so that platforms can see that it is not root. Nothing in the image belongs to it.
RUN groupadd --gid 10001 switchboard \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /nonexistent \
       --shell /usr/sbin/nologin switchboard

COPY --from=builder /opt/switchboard /opt/switchboard

# Production unless it is told otherwise: a variable that was forgotten then stops it, and does not open it.
ENV PATH=/opt/switchboard/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ENVIRONMENT=production

WORKDIR /srv
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM

# Only whether the process answers: one that waits for PostgreSQL is not helped by a restart.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --start-interval=2s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; health = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PORT') or 8000), timeout=4); health.request('GET', '/healthz'); sys.exit(health.getresponse().status != 200)"]

# IPv6 and IPv4 alike: private networks such as Railway's may know only the former.
CMD ["switchboard", "serve", "--host", "::"]
