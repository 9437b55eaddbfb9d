"""Which files a record of a data file may name: a data set is often somebody else's, and it must not choose freely what
this machine opens or fetches."""

import errno
import ipaddress
import os
import re
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fsspec.implementations.local import LocalFileSystem

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted, shortened
from megavlm.media.files import File, beside, is_url

_ORIGIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9+.-]*)://([^/?#]*)")
_LOCAL = ("file", "local")  # protocols of fsspec for local paths
_WEB = ("http", "https")


@dataclass(frozen=True)
class MediaAccess:
    """Locates the media of records, and refuses what the settings do not allow.

    Attributes:
        roots: folders (``data.media_roots``); a local file must be in one of them, also after all symbolic links are
            followed. None: any local file.
        protocols: ``data.media_protocols``: protocols ("https"), or single hosts or buckets ("s3://pictures"). URLs
            with the protocol and host of the data file itself are always allowed.
    """

    roots: tuple[str, ...] | None = None
    protocols: tuple[str, ...] = ()

    def find(self, data_file: str, source: str, named: str) -> File:
        """The file that a record of `data_file` refers to as `named` (see ``beside``).

        A File with http or https carries a ``PublicHosts``: whatever its host's name means and wherever it redirects
        to when it is read, addresses inside the network are refused unless their host is named in the settings.

        Raises UserError, with `source` ("file:line") in its message, if the settings do not allow the file.
        """
        file = beside(data_file, named)
        if not is_url(file.url):
            self._check_path(file.url, file.url, source)
            return file
        match = _ORIGIN.match(file.url)
        protocol = match[1] if match else ""
        if match is None or "::" in file.url:  # fsspec reads "::" as a chain, whose next link may be any URL
            raise UserError(f"{source}: {shortened(file.url)} is not a URL that a record may name")
        if protocol in _LOCAL:
            self._check_path(LocalFileSystem._strip_protocol(file.url), file.url, source)
            return file
        own = _ORIGIN.match(data_file)
        origins = [*([own[0]] if own else []), *(entry for entry in self.protocols if "://" in entry)]
        if match[0] not in origins and protocol not in self.protocols:
            origin = shortened(match[0])
            raise UserError(
                f"{source}: {shortened(file.url)} may not be read: data.media_protocols does not allow {origin}",
                f"if you trust this data, add {protocol} or {origin} to data.media_protocols "
                "(data prepare: --media-protocols)",
            )
        if protocol in _WEB:
            return File(file.url, guard=PublicHosts(tuple(o for o in origins if o.partition("://")[0] in _WEB)))
        return file

    def _check_path(self, path: str, named: str, source: str) -> None:
        if self.roots is None:
            return
        try:
            real = os.path.realpath(path)
            inside = any(os.path.commonpath([root, real]) == root for root in map(os.path.realpath, self.roots))
        except ValueError as error:  # a zero byte, or half a surrogate pair
            raise UserError(f"{source}: {quoted(named)} is not a path: {error}") from None
        if not inside:
            followed = f" (it leads to {shortened(real)})" if real != os.path.abspath(path) else ""
            raise UserError(
                f"{source}: {shortened(named)}{followed} may not be read: it is outside of data.media_roots = "
                f"{', '.join(self.roots)}",
                "if you trust this data, add its folder to data.media_roots (data prepare: --media-roots)",
            )


ANY_LOCAL_FILE = MediaAccess()
"""The access without settings: any local file, and URLs of the data file's own protocol and host."""


class PrivateAddressError(PermissionError):
    """A host has an address that is not public."""

    def __init__(self, *_: object) -> None:
        super().__init__(
            errno.EACCES,
            "its host, or one to which it redirects, has an address inside this machine or network (loopback, "
            "link-local, private); to allow that, add the host to data.media_protocols, as http://HOST:PORT",
        )


@dataclass(frozen=True)
class PublicHosts:
    """Makes HTTP clients for fsspec (its argument ``get_client``) that connect only to public addresses.

    The addresses are checked when a connection is made, so a name that means another address the second time, or a
    redirect, does not get past.

    Attributes:
        named: origins ("http://images.local:8080") whose addresses are allowed, too: the user has named them.
    """

    named: tuple[str, ...] = ()

    async def __call__(self, **options: Any) -> Any:
        """A client session with these options of aiohttp."""
        import aiohttp  # imported on first use, because few data sets are on the web

        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=self._socket), **options)

    def _socket(self, info: tuple) -> socket.socket:
        family, kind, protocol, _, address = info
        if not is_public(address[0]) and address[:2] not in self._named_addresses():
            raise PrivateAddressError
        return socket.socket(family, kind, protocol)

    def _named_addresses(self) -> set[tuple]:
        found = set()
        for origin in self.named:
            url = urlsplit(origin)
            port = url.port or (443 if url.scheme == "https" else 80)
            found |= {info[4][:2] for info in socket.getaddrinfo(url.hostname, port, type=socket.SOCK_STREAM)}
        return found


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, not of this machine or a private network."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    return ip.is_global and not ip.is_multicast
