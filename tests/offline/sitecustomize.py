"""Refuse every connection that leaves this machine.

`tests/conftest.py` installs it in pytest and puts this folder on the PYTHONPATH, so that Python starts every child
process of a test with it too: what the tests show, they show without network.
"""

import sys

LOOPBACK = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", ""}


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: raise on looking up or connecting to a host that is not this one."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):  # else a Unix socket: a path, not a host
        host = arguments[1][0]
    else:
        return
    name = host.decode() if isinstance(host, bytes) else host or ""
    if name not in LOOPBACK:
        raise ConnectionRefusedError(f"tests run without network, and something asked for {name!r}")


sys.addaudithook(refuse)
