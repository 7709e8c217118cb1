"""Python's search for garbage, for which everything stops, and the longer the more there is."""

import gc

_NEW = 20_000
"""How many more objects there may be than before until the new ones are searched. Requests leave hardly any garbage."""


def search_rarely() -> None:
    gc.set_threshold(_NEW)


def spare_what_is_there() -> None:
    """Keeps what is there by now out of every search: to look through all of it takes a seventh of a second."""
    gc.freeze()
