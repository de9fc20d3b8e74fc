"""Authorize a TCP connection by its destination address, or by a hostname that resolved to it."""

from __future__ import annotations

from dataclasses import dataclass

from agent.common.policy.addresses import Address
from agent.common.policy.hosts import same_or_none
from agent.common.policy.reasons import Reason
from agent.egress.dns.resolver import ResolveError, Resolver
from agent.egress.sandbox_state import Denied, SandboxState

_WEB_PORTS = frozenset({80, 443})


@dataclass(frozen=True, slots=True)
class Authorization:
    """What a connection was allowed for: `name` at `address`, or the address itself if `name` is ""."""

    name: str
    address: Address
    port: int

    def denial_reason(self, sandbox: SandboxState) -> Reason | None:
        """Return why the current policy forbids the connection, or None if it is allowed."""
        policy = sandbox.policy
        if self.name:
            return policy.check_name(self.name, self.port) or policy.check_dialled(self.address, self.port)
        return policy.check_address(self.address, self.port)


class ConnectionAuthorizer:
    """Authorizer of one connection. Each call evaluates the policy of that moment."""

    def __init__(self, sandbox: SandboxState, resolver: Resolver, address: Address, port: int) -> None:
        self._sandbox = sandbox
        self._resolver = resolver
        self.address = address
        self.port = port

    def is_unconditional(self) -> bool:
        """Return whether the address is allowed whatever protocol is spoken, so that the first bytes do not matter."""
        policy = self._sandbox.policy
        return (
            policy.check_address(self.address, self.port) is None
            and not self._sandbox.secrets
            and not policy.inspect
            and not any(rule.network is None for rule in policy.deny)
        )

    def likely_name(self) -> str:
        """Return the likely destination of a connection that names no host. Only for events: it is a guess."""
        names = self._sandbox.pins.names(self.address)
        return names[0] if names else str(self.address)

    def authorize_opaque(self) -> Authorization:
        """Authorize a protocol other than TLS and HTTP, in which the client names no host.

        :raises Denied: neither the address nor a name pinned to it is allowed with this port.
        """
        policy, port = self._sandbox.policy, self.port
        reason = policy.check_address(self.address, port)
        if reason is None:
            return Authorization("", self.address, port)
        names = self._sandbox.pins.names(self.address)
        if not names or reason in (Reason.BLOCKED_ADDRESS, Reason.DENIED_BY_OPERATOR):
            raise Denied(reason, str(self.address))
        why = Reason.ADDRESS_NOT_ALLOWED
        for name in names:
            refusal = policy.check_name(name, port)
            if refusal is None and (port not in _WEB_PORTS or policy.names_port(name, port)):
                return Authorization(name, self.address, port)
            why = refusal or Reason.PROTOCOL_NOT_ALLOWED
        raise Denied(why, names[0])

    def authorize_unnamed_tls(self) -> Authorization:
        """Authorize TLS without a server name.

        :raises Denied: the address itself is not allowed.
        """
        policy = self._sandbox.policy
        reason = policy.check_address(self.address, self.port)
        if reason is None:
            return Authorization("", self.address, self.port)
        known = any(policy.looks_up(name) for name in self._sandbox.pins.names(self.address))
        raise Denied(Reason.NO_SERVER_NAME if known else reason, self.likely_name())

    async def authorize_name(self, text: str) -> Authorization:
        """Authorize the hostname that the client sent, in TLS or HTTP.

        :raises Denied: neither the name nor the address is allowed, or the name does not resolve to the address.
        """
        policy, address, port = self._sandbox.policy, self.address, self.port
        itself = policy.check_address(address, port)
        name = same_or_none(text)
        if name is None:
            # An address in the Host header, or no valid name: allowed if the destination address is.
            if itself is None:
                return Authorization("", address, port)
            raise Denied(itself, text)
        reason = policy.check_name(name, port)
        if reason is not None:
            if reason is not Reason.DENIED_BY_OPERATOR and itself is None:
                return Authorization("", address, port)  # the address itself is listed
            raise Denied(reason, name)
        if not await self._name_has_address(name):
            if itself is None and not self._sandbox.secrets_for(name, port):
                return Authorization("", address, port)
            raise Denied(Reason.ADDRESS_MISMATCH, name)
        return Authorization(name, address, port)

    async def _name_has_address(self, name: str) -> bool:
        """Return whether the name resolved to the address, in an answer to the guest or now."""
        if self._sandbox.pins.has(name, self.address):
            return True
        try:
            answer = await self._resolver.addresses(name, self._sandbox.policy)
        except ResolveError:
            return False
        self._sandbox.pins.pin(name, answer.addresses, answer.ttl_s)
        return self.address in answer.addresses
