"""One entry of an allow or deny list: parsed from text, and back.

example.com          this host, any port          1.2.3.4       this address, any port
example.com:443      this host, this port         1.2.3.4:443   this address and port
*.example.com        every name below it, never   [2001:db8::1]:443
                     example.com itself           203.0.113.0/24, [2001:db8::/32]:443
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_network

from agent.common.errors import InvalidSpec
from agent.common.policy.addresses import Address, Network
from agent.common.policy.hosts import normalise

MAX_RULES = 1024
MAX_RULE_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Rule:
    """A name, or all names under one, or a range of addresses; each on one port or on all (None)."""

    name: str = ""
    wildcard: bool = False  # `name` is then what the names are below
    network: Network | None = None
    port: int | None = None

    def has_name(self, name: str) -> bool:
        """Whether the rule is for this (normalised) host name, whatever the port."""
        if self.network is not None:
            return False
        return name.endswith(f".{self.name}") if self.wildcard else name == self.name

    def has_address(self, address: Address) -> bool:
        """Whether the rule is for this address, whatever the port."""
        return self.network is not None and self.network.version == address.version and address in self.network

    def has_port(self, port: int) -> bool:
        """Whether the rule is for this port."""
        return self.port is None or self.port == port

    def __str__(self) -> str:
        """Returns the normalised text, which parses to the same rule."""
        if self.network is None:
            host = f"*.{self.name}" if self.wildcard else self.name
        else:
            single = self.network.prefixlen == self.network.max_prefixlen
            host = str(self.network.network_address if single else self.network)
            if self.network.version == 6:
                host = f"[{host}]"
        return host if self.port is None else f"{host}:{self.port}"


def parse_rule(text: str) -> Rule:
    """Returns the rule that `text` states. :raises InvalidSpec: it states none; the message says what to write."""
    if len(text) > MAX_RULE_CHARACTERS:
        raise InvalidSpec(f"{text[:60]!r}... is over {MAX_RULE_CHARACTERS} characters; write a host name or an address")
    if "://" in text:
        raise InvalidSpec(f"rule {text[:80]!r}: write the host alone, without scheme and path")
    host, port = _split_port(text.strip())
    network = _network(host, text)
    if network is not None:
        return Rule(network=network, port=port)
    wildcard = host.startswith("*.")
    try:
        name = normalise(host.removeprefix("*.") if wildcard else host)
    except ValueError as error:
        hint = "; to allow everything, leave the list out" if host == "*" else ""
        raise InvalidSpec(f"rule {text[:80]!r}: {error}{hint}") from None
    return Rule(name=name, wildcard=wildcard, port=port)


def parse_rules(texts: Iterable[str], what: str) -> tuple[Rule, ...]:
    """Returns the rules, each once, in order. :raises InvalidSpec: a bad one, or too many; `what` names the list."""
    rules = tuple(dict.fromkeys(parse_rule(text) for text in texts))
    if len(rules) > MAX_RULES:
        raise InvalidSpec(f"{what} has {len(rules)} entries; at most {MAX_RULES} are allowed: use wildcards or ranges")
    return rules


def _split_port(text: str) -> tuple[str, int | None]:
    host, separator, port = text.rpartition(":")
    if not separator or host.endswith(":") or (":" in host and not host.endswith("]")) or text.endswith("]"):
        return text, None  # no port; bare IPv6 addresses are not taken for one
    if not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535):
        raise InvalidSpec(f"rule {text[:80]!r}: the port must be a number from 1 to 65535")
    return host, int(port)


def _network(host: str, text: str) -> Network | None:
    bracketed = host.startswith("[") and host.endswith("]")
    inner = host[1:-1] if bracketed else host
    try:
        network = ip_network(inner, strict=False)
    except ValueError:
        if bracketed:
            raise InvalidSpec(f"rule {text[:80]!r}: {inner[:60]!r} is not an IPv6 address or range") from None
        return None
    if bracketed and network.version != 6:
        raise InvalidSpec(f"rule {text[:80]!r}: brackets are for IPv6 addresses")
    return network
