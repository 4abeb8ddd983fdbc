"""Where the processes of a test meet."""

from __future__ import annotations

import os
import socket

# Below the ports that the system gives to whoever asks for any: one of those could be taken in the
# seconds until the process that it is for listens there.
_LOWEST, _HIGHEST = 20_000, 32_767


def free_port() -> int:
    """Return a port of this machine where nobody listens; processes do not look at the same."""
    first = _LOWEST + 10 * os.getpid() % 10_000
    return next(filter(_is_free, range(first, _HIGHEST)))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
