"""Stub resolver on the node's recursive resolvers: for the answers to guests, and for addresses to connect to.

dnspython sends each query from a port of its own with a random id, by UDP, and by TCP after a truncated answer
(RFC 7766). Answers that do not match the question are ignored (RFC 5452).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import cast

import dns.asyncbackend
import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.resolver
import dns.rrset

from agent.common.aio import cancel_and_wait
from agent.common.policy.addresses import Address, parse_server
from agent.common.policy.policy import Policy

_MAX_CACHED = 4096
_MAX_TTL_S = 3600.0
_NEGATIVE_TTL_S = 5.0
_MAX_ADDRESSES = 64  # per name and record type
_MAX_IN_FLIGHT = 512
# Chosen here: dnspython would look for the event loop's library at each query, and load its code at the first one.
_BACKEND = dns.asyncbackend.get_backend("asyncio")


class ResolveError(Exception):
    """The lookup failed. `reason` is nxdomain, nodata, servfail, timeout or blocked."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BlockedAnswer(ResolveError):
    """The name has addresses, but none that the sandbox may connect to."""

    def __init__(self) -> None:
        super().__init__("blocked")


@dataclass(frozen=True, slots=True)
class Answer:
    """Addresses of a name. `ttl_s` is the lowest TTL among the records, aliases included."""

    addresses: tuple[Address, ...]
    ttl_s: float


@dataclass(frozen=True, slots=True)
class _CacheEntry:
    answer: dns.rrset.RRset | None
    reason: str  # of `answer` being None
    until: float


def system_resolvers() -> list[str]:
    """Return the resolvers of /etc/resolv.conf (resolv.conf(5)); [] if it has none."""
    try:
        return [str(server) for server in dns.resolver.Resolver(configure=True).nameservers]
    except dns.exception.DNSException:
        return []


def load_all() -> None:
    """Load the modules of all record types, which the process may not be allowed to read later."""
    dns.rdata.load_all_types()  # type: ignore[no-untyped-call]


class Resolver:
    """Resolver with a bounded cache, shared by all sandboxes. Concurrent lookups of one question are merged.

    :param servers: "address" or "address:port" ("[v6]:port"), tried in turn from a random one on.
    :param timeout_s: of each attempt.
    """

    def __init__(self, servers: Sequence[str], timeout_s: float = 2.0, attempts: int = 3) -> None:
        self._servers = [parse_server(server) for server in servers]
        self._timeout_s = timeout_s
        self._attempts = max(attempts, 1)
        self._cache: OrderedDict[tuple[str, dns.rdatatype.RdataType], _CacheEntry] = OrderedDict()
        self._running: dict[tuple[str, dns.rdatatype.RdataType], asyncio.Task[_CacheEntry]] = {}
        self._room = asyncio.Semaphore(_MAX_IN_FLIGHT)

    async def aclose(self) -> None:
        """Cancel all lookups."""
        await cancel_and_wait(*self._running.values())

    async def addresses(self, name: str, policy: Policy) -> Answer:
        """Return the addresses of a (normalised) name that the policy allows connecting to.

        :raises BlockedAnswer: the policy allows none of the addresses.
        :raises ResolveError: the name has no addresses, or the lookup failed.
        """
        kinds = (dns.rdatatype.A, dns.rdatatype.AAAA)
        results = await asyncio.gather(
            *(self.addresses_of_type(name, kind, policy) for kind in kinds), return_exceptions=True
        )
        found = [result for result in results if isinstance(result, Answer)]
        if found:
            addresses = tuple(address for answer in found for address in answer.addresses)
            return Answer(addresses, min(answer.ttl_s for answer in found))
        errors = [result for result in results if isinstance(result, ResolveError)]
        for result in results:
            if not isinstance(result, ResolveError):
                raise cast("BaseException", result)
        # "No address" of one family is less informative than the error of the other.
        raise next((error for error in errors if error.reason != "nodata"), errors[0])

    async def addresses_of_type(self, name: str, kind: dns.rdatatype.RdataType, policy: Policy) -> Answer:
        """Return only the A or AAAA records; see `addresses`.

        :raises BlockedAnswer: the policy allows none of the addresses.
        :raises ResolveError: the name has no such addresses, or the lookup failed.
        """
        records, ttl_s = await self.query(name, kind)
        everything = [ip_address(str(record.address)) for record in records][:_MAX_ADDRESSES]
        allowed = tuple(address for address in everything if policy.check_dialled(address, 0) is None)
        if not allowed:
            raise BlockedAnswer
        return Answer(allowed, ttl_s)

    async def query(self, name: str, kind: dns.rdatatype.RdataType) -> tuple[dns.rrset.RRset, float]:
        """Return the records of a name after following aliases, and their remaining TTL in seconds.

        :raises ResolveError: the name has no such records, or the lookup failed.
        """
        key = (name, kind)
        found = self._cache.get(key)
        if found is None or found.until <= time.monotonic():
            task = self._running.get(key)
            if task is None:
                task = self._running[key] = asyncio.create_task(self._look_up(name, kind))
                task.add_done_callback(lambda _: self._running.pop(key, None))
            found = await asyncio.shield(task)
        if found.answer is None:
            raise ResolveError(found.reason)
        return found.answer, max(found.until - time.monotonic(), 0.0)

    async def _look_up(self, name: str, kind: dns.rdatatype.RdataType) -> _CacheEntry:
        async with self._room:
            message, why = await self._ask(name, kind)
        now = time.monotonic()
        if message is None:
            return _CacheEntry(None, why, now)  # not cached: it says nothing about the name
        try:
            chain = message.resolve_chaining()
        except dns.exception.DNSException:  # a loop of aliases, or two for one name
            return _CacheEntry(None, "servfail", now)
        if message.rcode() == dns.rcode.NXDOMAIN:
            found = _CacheEntry(None, "nxdomain", now + _NEGATIVE_TTL_S)
        elif chain.answer is None:
            found = _CacheEntry(None, "nodata", now + _NEGATIVE_TTL_S)
        else:
            found = _CacheEntry(chain.answer, "", now + min(float(chain.minimum_ttl), _MAX_TTL_S))
        self._cache[name, kind] = found
        while len(self._cache) > _MAX_CACHED:
            self._cache.popitem(last=False)
        return found

    async def _ask(self, name: str, kind: dns.rdatatype.RdataType) -> tuple[dns.message.QueryMessage | None, str]:
        why = "servfail"
        first = random.randrange(len(self._servers)) if self._servers else 0  # noqa: S311  only spreads the load
        for attempt in range(self._attempts if self._servers else 0):
            host, port = self._servers[(first + attempt) % len(self._servers)]
            question = dns.message.make_query(dns.name.from_text(name), kind, use_edns=0, payload=1232)
            try:
                message, _ = await dns.asyncquery.udp_with_fallback(
                    question, host, self._timeout_s, port, ignore_unexpected=True, ignore_errors=True, backend=_BACKEND
                )
            except dns.exception.Timeout:
                why = "timeout"
            except (OSError, EOFError, dns.exception.DNSException):
                why = "servfail"
            else:
                if message.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                    return cast("dns.message.QueryMessage", message), ""
                why = "servfail"
        return None, why
