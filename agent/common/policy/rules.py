"""Rule of an allow or deny list: parsed from text and rendered as text.

example.com          this host, any port          1.2.3.4       this address, any port
example.com:443      this host, this port         1.2.3.4:443   this address and port
*.example.com        every name below it, never   [2001:db8::1]:443
                     example.com itself           203.0.113.0/24, [2001:db8::/32]:443
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_network
from typing import Final

from agent.common.errors import InvalidSpec
from agent.common.policy.addresses import Address, IpRange
from agent.common.policy.hosts import normalise

MAX_RULES = 1024
MAX_RULE_CHARACTERS = 300


class Rule:
    """A host name, all names below a domain, or an address range; each on one port or on every port. Immutable.

    A plain class, since msgspec would store a dataclass field by field; records have the text of a rule.

    :param name: normalised host name; the domain of a wildcard; "" in a rule for addresses.
    :param port: None: every port.
    """

    __slots__ = ("name", "network", "port", "wildcard")

    def __init__(
        self, *, name: str = "", wildcard: bool = False, network: IpRange | None = None, port: int | None = None
    ) -> None:
        self.name: Final = name
        self.wildcard: Final = wildcard
        self.network: Final = network
        self.port: Final = port

    def _key(self) -> tuple[object, ...]:
        return self.name, self.wildcard, self.network, self.port

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Rule) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Rule({str(self)!r})"

    def has_name(self, name: str) -> bool:
        """Whether the rule matches this normalised host name, on any port."""
        if self.network is not None:
            return False
        return name.endswith(f".{self.name}") if self.wildcard else name == self.name

    def has_address(self, address: Address) -> bool:
        """Whether the rule matches this address, on any port."""
        return self.network is not None and self.network.version == address.version and address in self.network

    def has_port(self, port: int) -> bool:
        """Whether the rule matches this port."""
        return self.port is None or self.port == port

    def __str__(self) -> str:
        """Return the normalised text, which `parse_rule` turns into an equal rule."""
        if self.network is None:
            host = f"*.{self.name}" if self.wildcard else self.name
        else:
            single = self.network.prefixlen == self.network.max_prefixlen
            host = str(self.network.network_address if single else self.network)
            if self.network.version == 6:
                host = f"[{host}]"
        return host if self.port is None else f"{host}:{self.port}"


def parse_rule(text: str) -> Rule:
    """Parse one rule.

    :raises InvalidSpec: the text is not a rule; the message says what to write instead.
    """
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
    """Parse a list of rules; duplicates are removed, the order is kept.

    :param what: name of the list, for the error message.
    :raises InvalidSpec: a text is not a rule, or there are more than 1024.
    """
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


def _network(host: str, text: str) -> IpRange | None:
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
