"""What is compared, and what is measured, by name."""

SWITCHBOARD = "Switchboard"
BASELINE = "the guide in Python"
PEER = "peer"
EMPTY = "empty FastAPI"
NCHAN = "nchan"

ONE_RUN = "callbacks of one run, 32 connections"
SPREAD_BESIDE = "callbacks of many runs beside it, 32 connections"
LIVES = "callbacks as runs live, 32 connections"
TRIGGERS = "triggers, 32 connections"

STATUS = "status of 100 runs that many poll, 32 connections"
SHORT_LIST = "10 runs of a context, 32 connections"
LONG_LIST = "200 runs of a context, 8 connections"
NEWEST = "newest 200 runs of all, 8 connections"
READS = (STATUS, SHORT_LIST, LONG_LIST, NEWEST)

GROWN = "Switchboard, grown"
SMALL = "Switchboard, small"
GROWN_CALLBACKS = "callbacks, 8 connections"
GROWN_LIST = "10 runs of a context, 8 connections"
GROWN_NEWEST = "newest 200 runs, 8 connections"
GROWN_TIMELINE = "timeline of a run, 8 connections"
# Callbacks come last: they lengthen what the others read.
GROWTH = (GROWN_LIST, GROWN_NEWEST, GROWN_TIMELINE, GROWN_CALLBACKS)


def spread(connections: int) -> str:
    """Callbacks of many runs."""
    return f"callbacks of many runs, {connections} connection{'s' if connections > 1 else ''}"
