"""What proxies in front say of a request: who its client is, and what URL that has asked for.

A file to lay beside minibottle.py, where it is minibottle.proxies; the server reads it when it is
told which proxies to trust, by their addresses, their networks, or as whoever uses a Unix socket:

    python minibottle.py app:main --trusted-proxies 10.0.0.0/8 --trusted-proxies unix

A connection from one of these is its client's in all that the application and the access log see:
REMOTE_ADDR, wsgi.url_scheme, HTTP_HOST and SERVER_PORT of the environ, so request.url, too, and
minibottle.peer is the proxy's address. From anybody else the fields mean nothing.

    X-Forwarded-For     read from its end, where the last proxy has written, as far as it names
                        proxies that are trusted: the next one is the client
    X-Forwarded-Proto, X-Forwarded-Host, X-Forwarded-Port
                        the last value of each

What is no address, scheme, host or port is dropped. A proxy must set each of these or take it away,
since many pass on what a client says. So there are no more of them: of X-Forwarded-For and
Forwarded (RFC 7239), most proxies write one, and clients might write the other; and a path that the
proxy has cut off (X-Forwarded-Prefix) is better left there, for mount().
"""

from __future__ import annotations

import re
from functools import lru_cache, partial
from ipaddress import ip_address, ip_network
from typing import Any, Callable, Dict, Iterable, Optional, Tuple

from . import HOST, UsageError

SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}
HOP = r"(?:([0-9.]+)|\[([0-9A-Fa-f:.]+)\])(?::([0-9]{1,5}))?|([0-9A-Fa-f:.]+)"
PORTS = {"http": "80", "https": "443"}
FORWARDING = ("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_REAL_IP", "HTTP_X_FORWARDED_FOR",
              "HTTP_X_FORWARDED_HOST", "HTTP_X_FORWARDED_PROTO")
MAX_MEMO = 1000       # addresses remembered
MAX_HOP_CHARS = 60    # more than an address with its port has

Plan = Callable[[Dict[str, Any]], Any]


def install(worker: Any) -> None:
    """The server calls it where the setting is given: the plan is the first to see an environ."""
    worker.plan = forwarding(worker.settings.trusted_proxies, worker.plan)


def forwarding(trusted: Iterable[str], plan: Plan) -> Plan:
    """`plan`, of environs with what these proxies say in them.

    Raises UsageError for what is no address, network or "unix".
    """
    is_trusted = lru_cache(MAX_MEMO)(partial(is_one_of, *parse_trusted(trusted)))

    def forwarded(environ: Dict[str, Any]) -> Any:
        if is_trusted(environ["REMOTE_ADDR"]):
            forward(environ, is_trusted)
        return plan(environ)
    return forwarded


def parse_trusted(names: Iterable[str]) -> Tuple[bool, list]:
    """("unix", "10.0.0.0/8") -> (True, [its network])."""
    networks = []
    for name in names:
        if name != "unix":
            try:
                networks.append(ip_network(name))
            except ValueError as error:
                raise UsageError(f"setting trusted_proxies: {error}; it is an address, a network "
                                 "such as 10.0.0.0/8, or unix") from None
    return "unix" in names, networks


def is_one_of(unix: bool, networks: list, addr: str) -> bool:
    """Of a REMOTE_ADDR, which is "" on a Unix socket."""
    hop = parse_hop(addr.partition("%")[0])  # fe80::1%eth0
    return unix if not addr else bool(hop) and any(ip_address(hop[0]) in net for net in networks)


@lru_cache(MAX_MEMO)
def parse_hop(text: str) -> Optional[Tuple[str, str]]:
    """"1.2.3.4:80" -> ("1.2.3.4", "80"), "[::1]", "::1" -> ("::1", ""), "unknown" -> None."""
    match = re.fullmatch(HOP, text)
    host = match and (match[1] or match[2] or match[4]) or ""
    try:
        address: Any = ip_address(host)
    except ValueError:
        return None
    return str(getattr(address, "ipv4_mapped", None) or address), match and match[3] or ""


def find_client(hops: str, is_trusted: Callable[[str], bool]) -> Optional[Tuple[str, str]]:
    """The right-most that is not trusted. What is left of it, or of rubbish, anybody may have
    written."""
    client = None
    for text in reversed(hops.split(",")):
        hop = parse_hop(text.strip(" \t")[:MAX_HOP_CHARS])
        if hop is None:
            break
        client = hop
        if not is_trusted(hop[0]):
            break
    return client


def forward(environ: Dict[str, Any], is_trusted: Callable[[str], bool]) -> None:
    """Put into an environ what a trusted peer says of it."""
    client = find_client(environ.get("HTTP_X_FORWARDED_FOR", ""), is_trusted)
    if client is not None:
        environ["minibottle.peer"] = environ["REMOTE_ADDR"]
        environ["REMOTE_ADDR"], environ["REMOTE_PORT"] = client
    scheme = SCHEMES.get(last_of(environ, "HTTP_X_FORWARDED_PROTO").lower())
    host = last_of(environ, "HTTP_X_FORWARDED_HOST")
    if host[:1] in ("", ":") or not HOST.fullmatch(host):
        host = ""
    port = last_of(environ, "HTTP_X_FORWARDED_PORT")
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        port = ""
    if scheme or host or port:
        set_url(environ, scheme or environ["wsgi.url_scheme"],
                host or environ.get("HTTP_HOST", ""), port)


def last_of(environ: Dict[str, Any], name: str) -> str:
    """Of a list: what the trusted peer has added, or passed on."""
    return environ.get(name, "").rpartition(",")[2].strip(" \t")


def set_url(environ: Dict[str, Any], scheme: str, host: str, port: str) -> None:
    """The scheme and authority of request.url. A host beats the port, if it has one itself."""
    own = re.search(":([0-9]*)$", host)
    if own:
        port = own[1]
    elif host and port not in ("", PORTS[scheme]):
        host += ":" + port
    environ["wsgi.url_scheme"] = scheme
    environ["SERVER_PORT"] = port or PORTS[scheme]
    if host:
        environ["HTTP_HOST"] = host


def is_local(environ: Dict[str, Any]) -> bool:
    """Has somebody on this machine asked, by a name of this machine: what is not for the world?

    A page of the world may have its name lead here (DNS rebinding), hence the Host. A proxy that
    nobody has named to us may stand here, too: then it says so, or speaks HTTP/1.0, as nginx does
    that was told no more than where to pass requests on.
    """
    if environ.get("SERVER_PROTOCOL") == "HTTP/1.0" or "minibottle.peer" not in environ and any(
            key in environ for key in FORWARDING):
        return False
    return is_loopback(environ.get("REMOTE_ADDR", "")) and is_loopback(environ.get("HTTP_HOST", ""))


def is_loopback(host: str) -> bool:
    """Of "127.0.0.1", "::1", "[::1]:80", "localhost:80"."""
    hop = parse_hop(re.sub("^localhost(?=:|$)", "127.0.0.1", host.lower()[:MAX_HOP_CHARS]))
    return hop is not None and ip_address(hop[0]).is_loopback
