"""A private PostgreSQL and Valkey under a data folder, for development and tests.

A detached *keeper* (``python -m switchboard.embedded DATA_DIR``) owns both servers. Who needs them holds a
shared lock on ``users.lock``; the keeper stops the servers once it gets that lock for itself. The kernel
releases a lock however its holder ends, so nothing has to be counted or cleaned up, whoever is killed.

    users.lock          shared by every user; taken exclusively by a keeper that stops
    keeper.lock         held by the keeper for its life
    servers.json        where the servers answer; to be trusted only while keeper.lock is held
    keeper.log          what the keeper and its servers had to say since the last start
    postgres/ valkey/   the data

The servers listen on Unix sockets alone, so that two checkouts never meet on a port, and in a short folder of
their own, as the path of a socket may have no more than about 100 bytes. The wheels deliver the programs only:
their own code to start and stop them breaks on paths with spaces, shares one lock file among all users of a
machine, opens every folder above the data to everybody when it runs as root, and kills a Valkey that saves.

`lease` is what a user does, `keeper` what the keeper does, `servers` the two programs and how they are started,
and `folder` what a user and a keeper have to agree on.
"""

from switchboard.embedded.lease import found, running
from switchboard.embedded.servers import EmbeddedUnavailable, Servers

__all__ = ["EmbeddedUnavailable", "Servers", "found", "running"]
