"""Where an http server sends its reader: never from outside to the inside of a network.

Addresses may come from a list that someone else wrote. What they name is seen before it is read; what a server answers
with is not, and might be the address of a service that trusts this machine.
"""

import asyncio
import ipaddress
import socket
from typing import Any

from synthos.data.store.location import masked


class RefusedRedirect(OSError, ValueError):
    """An OSError, for the network failed; a ValueError, for asking again can't help."""


def watched() -> Any:
    """An aiohttp.TraceConfig that refuses such a redirect before it is followed."""
    from aiohttp import TraceConfig

    trace = TraceConfig()
    trace.on_request_redirect.append(_check)
    return trace


async def _check(session: Any, context: Any, asked: Any) -> None:
    from yarl import URL

    answer = asked.response.headers
    target = asked.url.join(URL(answer.get("Location") or answer.get("URI") or ""))
    if target.host is None or target.host == asked.url.host:
        return
    if await is_inside(target.host) and not await is_inside(asked.url.host):
        raise RefusedRedirect(
            f"a redirect to {masked(str(target.with_query(None)))}, of a private network or of this machine, is not "
            "followed; where it is meant, name it itself"
        )


async def is_inside(host: str) -> bool:
    """Whether a name or address means this machine or a private network; what can't be looked up does not."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:  # as behind a proxy, which looks names up itself
        return False
    return any(not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global for *_, address in found)
