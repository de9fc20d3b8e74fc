"""On what grounds a connection to one address and port may pass: by that address itself, or by a name that has it."""

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
    """Why a connection was let through: `name` at `address`, or the address as itself where there is no name."""

    name: str
    address: Address
    port: int

    def denial_reason(self, sandbox: SandboxState) -> Reason | None:
        """Returns why the sandbox's policy, as it is now, would not let it through."""
        policy = sandbox.policy
        if self.name:
            return policy.check_name(self.name, self.port) or policy.check_dialled(self.address, self.port)
        return policy.check_address(self.address, self.port)


class ConnectionAuthorizer:
    """Decides about connections to one address and port. Each answer is by the policy as it is at that moment."""

    def __init__(self, sandbox: SandboxState, resolver: Resolver, address: Address, port: int) -> None:
        self._sandbox = sandbox
        self._resolver = resolver
        self.address = address
        self.port = port

    def is_unconditional(self) -> bool:
        """Whether the address may be reached as itself and nothing depends on what is said there."""
        policy = self._sandbox.policy
        return (
            policy.check_address(self.address, self.port) is None
            and not self._sandbox.secrets
            and not policy.inspect
            and not any(rule.network is None for rule in policy.deny)
        )

    def likely_name(self) -> str:
        """Returns what a connection that did not say is probably for: for the event alone."""
        names = self._sandbox.pins.names(self.address)
        return names[0] if names else str(self.address)

    def authorize_opaque(self) -> Authorization:
        """Returns the grounds for a protocol that names no host. :raises Denied:"""
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
        """Returns the grounds for TLS that asks for no name. :raises Denied:"""
        policy = self._sandbox.policy
        reason = policy.check_address(self.address, self.port)
        if reason is None:
            return Authorization("", self.address, self.port)
        known = any(policy.looks_up(name) for name in self._sandbox.pins.names(self.address))
        raise Denied(Reason.NO_SERVER_NAME if known else reason, self.likely_name())

    async def authorize_name(self, text: str) -> Authorization:
        """Returns the grounds for a name that the client asked for at this address. :raises Denied:"""
        policy, address, port = self._sandbox.policy, self.address, self.port
        itself = policy.check_address(address, port)
        name = same_or_none(text)
        if name is None:
            # An address as a name (of HTTP), or nonsense: what is listed as an address passes as one.
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
        """Whether the address is the name's: it was answered so, or is now."""
        if self._sandbox.pins.has(name, self.address):
            return True
        try:
            answer = await self._resolver.addresses(name, self._sandbox.policy)
        except ResolveError:
            return False
        self._sandbox.pins.pin(name, answer.addresses, answer.ttl_s)
        return self.address in answer.addresses
