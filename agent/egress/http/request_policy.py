"""Policy for requests on an intercepted connection: which host a request may name, and which secrets are injected."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus

from agent.common.policy.addresses import Address
from agent.common.policy.hosts import same_or_none
from agent.common.policy.reasons import Reason
from agent.egress.http.secret_injection import Headers, SecretInjection, secrets_mentioned
from agent.egress.sandbox_state import Denied, SandboxState

_STATUS = {
    Reason.HOST_MISMATCH: HTTPStatus.MISDIRECTED_REQUEST,
    Reason.MALFORMED: HTTPStatus.BAD_REQUEST,
    Reason.TOO_LARGE: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    Reason.TIMEOUT: HTTPStatus.REQUEST_TIMEOUT,
    Reason.UPSTREAM_UNVERIFIED: HTTPStatus.BAD_GATEWAY,
}
_WHY = {
    Reason.HOST_MISMATCH: "the request names another host than the one that its connection is for",
    Reason.MALFORMED: "the request cannot be understood in one way only",
    Reason.TOO_LARGE: "the request's headers are too large",
    Reason.TIMEOUT: "the request did not arrive in time",
    Reason.HOST_NOT_ALLOWED: "this host is not on the sandbox's allow list",
    Reason.PORT_NOT_ALLOWED: "this host is on the sandbox's allow list with another port",
    Reason.ADDRESS_NOT_ALLOWED: "this address is not on the sandbox's allow list",
    Reason.ADDRESS_MISMATCH: "this host is not at this address",
    Reason.DENIED_BY_OPERATOR: "the operator of this node denies this host",
    Reason.BLOCKED_ADDRESS: "sandboxes may not reach this address",
    Reason.NO_SERVER_NAME: "the request names no host",
    Reason.PROTOCOL_NOT_ALLOWED: "this kind of request is not let through",
    Reason.UPSTREAM_UNVERIFIED: "the server's certificate could not be verified",
}


@dataclass(frozen=True, slots=True)
class Target:
    """Destination of an intercepted connection. `name` is "" without TLS: each request names its host then.

    :param alpn: protocols that the guest's client offers.
    """

    name: str
    port: int
    address: Address
    alpn: tuple[str, ...]
    tls: bool


def answer_for(reason: Reason, host: str, detail: str = "") -> tuple[int, bytes]:
    """Return status and text of the response to a denied request."""
    why = _WHY.get(reason, reason.value)
    extra = f" ({detail})" if detail else ""
    text = f"sandboxd: {host or 'request'}: {why}{extra} [{reason.value}]\n"
    return int(_STATUS.get(reason, HTTPStatus.FORBIDDEN)), text.encode(errors="replace")


def unreachable(host: str, error: Exception) -> tuple[int, bytes]:
    """Return status and text of the response if the server cannot be connected to."""
    why = "no answer in time" if isinstance(error, TimeoutError) else str(error)
    return int(HTTPStatus.BAD_GATEWAY), f"sandboxd: {host} cannot be reached: {why}\n".encode(errors="replace")


@dataclass(slots=True)
class AllowedRequest:
    """A request that is allowed, with the secrets to inject into it."""

    host: str
    injection: SecretInjection


class RequestPolicy:
    """Request policy of one connection.

    :param authorize: called with the host of each request; raises Denied if the connection's address forbids it.
    """

    def __init__(self, sandbox: SandboxState, target: Target, authorize: Callable[[str], Awaitable[None]]) -> None:
        self._sandbox = sandbox
        self.target = target
        self._authorize = authorize

    async def check(self, authority: str, target: bytes, headers: Headers) -> AllowedRequest:
        """Check a request for this authority ("host" or "host:port").

        :raises Denied: its host is forbidden, or not the one that the connection is for.
        """
        host = self._host(authority)
        if self.target.tls:
            if same_or_none(host) != self.target.name:
                raise Denied(Reason.HOST_MISMATCH, host)
            await self._authorize(self.target.name)
            secrets = self._sandbox.secrets_for(self.target.name, self.target.port)
        else:
            await self._authorize(host)
            secrets = ()
        for secret in secrets_mentioned(self._sandbox.secrets, target, headers):
            if secret not in secrets:
                self.deny(Reason.SECRET_WITHHELD, host)
        return AllowedRequest(host, SecretInjection(secrets))

    def _host(self, authority: str) -> str:
        host, separator, port = authority.rpartition(":")
        if not separator or authority.endswith("]"):
            host, port = authority, ""
        if not host:
            raise Denied(Reason.NO_SERVER_NAME)
        if port and not (port.isascii() and port.isdecimal() and int(port) == self.target.port):
            raise Denied(Reason.HOST_MISMATCH, authority)
        return host.removeprefix("[").removesuffix("]")

    def deny(self, reason: Reason, host: str) -> None:
        """Count a denial."""
        self._sandbox.deny(reason, host, self.target.port, "http")
