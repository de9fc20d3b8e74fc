"""Parse a client's request for a new sandbox, and convert it to the API's request.

The request is JSON in base64 in the header x-deno-sandbox-config of the WebSocket handshake. It has two dialects:
JavaScript sends `stop_at_ms` and a list of volumes, Python sends `timeout` and a map of volumes.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from typing import Annotated

import msgspec
from msgspec import Meta

from agent.common.tokens import Token
from agent.gateway.errors import HttpError
from sandboxd.v1 import sandbox_pb2 as pb

DEFAULT_MEMORY_MB = 1280
LEASE_S = 60  # of a sandbox with the lifetime of its client's connection, which renews the lease
_MAX_HEADER_BYTES = 64 << 10
_ORG_VARIABLE = "DENO_DEPLOY_ORGANIZATION_ID"  # set by the hosted service, and read by programs
_DURATION = re.compile(r"([1-9][0-9]{0,6})([sm])")


class _Secret(msgspec.Struct):
    hosts: list[str]
    value: str


class _Root(msgspec.Struct):
    volume: str


class _Mount(msgspec.Struct):
    volume: str
    path: str


class CreateConfig(msgspec.Struct, kw_only=True):
    """Contents of the header, in both dialects."""

    memory_mb: Annotated[int, Meta(ge=1, le=1 << 24)] = DEFAULT_MEMORY_MB
    stop_at_ms: int | None = None
    timeout: str | None = None
    region: str | None = None
    labels: dict[str, str] | None = None
    env: dict[str, str] | None = None
    root: _Root | None = None
    volumes: list[_Mount] | dict[str, str] | None = None
    allow_net: list[str] | None = None
    secrets: dict[str, _Secret] | None = None

    def expires_at(self) -> float | None:
        """Return the time of expiry in seconds since 1970, or None if the sandbox ends with its client's connection.

        :raises HttpError: 400, `timeout` has an unknown form.
        """
        if self.stop_at_ms is not None:
            return self.stop_at_ms / 1000
        if self.timeout is None or self.timeout == "session":
            return None
        match = _DURATION.fullmatch(self.timeout)
        if match is None:
            raise HttpError(400, "INVALID_TIMEOUT", f'timeout {self.timeout[:40]!r} is not "session", "30s" or "5m"')
        return time.time() + int(match[1]) * (60 if match[2] == "m" else 1)

    def mounts(self) -> dict[str, str]:
        """Return the volume of each mount path."""
        if isinstance(self.volumes, dict):
            return self.volumes
        return {mount.path: mount.volume for mount in self.volumes or []}


def parse_config(header: str | None) -> CreateConfig:
    """Parse the header x-deno-sandbox-config.

    :raises HttpError: 400, the header is missing, too long, or not base64 of valid JSON.
    """
    if header is None:
        raise HttpError(400, "MISSING_CONFIG", "the header x-deno-sandbox-config is missing")
    if len(header) > _MAX_HEADER_BYTES:
        raise HttpError(400, "INVALID_CONFIG", f"the config has more than {_MAX_HEADER_BYTES} bytes")
    try:
        raw = base64.b64decode(header, validate=True)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = raw.decode("latin-1")  # btoa() of JavaScript: one byte per character
        return msgspec.json.decode(text, type=CreateConfig)
    except (binascii.Error, ValueError) as error:
        raise HttpError(400, "INVALID_CONFIG", f"the config is not base64 of valid JSON: {error}") from None


def create_request(config: CreateConfig, token: Token, image: str, vcpus: int) -> pb.CreateSandboxRequest:
    """Return the API's request.

    :raises HttpError: 403, a limit of the token is exceeded; 400, the time of expiry has passed.
    """
    memory_bytes = config.memory_mb << 20
    if token.max_memory_bytes and memory_bytes > token.max_memory_bytes:
        raise HttpError(
            403, "MEMORY_QUOTA",
            f"memory is {config.memory_mb} MiB; this token allows {token.max_memory_bytes >> 20} MiB",
        )  # fmt: skip
    request = pb.CreateSandboxRequest(
        image="" if config.root else image, vcpus=vcpus, memory_bytes=memory_bytes, labels=config.labels or {},
        env={_ORG_VARIABLE: token.org, **(config.env or {})}, tenant=token.org, volumes=config.mounts(),
        root=config.root.volume if config.root else "",
    )  # fmt: skip
    expiry_time = config.expires_at()
    if expiry_time is None:
        request.lifetime.lease.FromSeconds(LEASE_S)
    else:
        seconds = expiry_time - time.time()
        if seconds < 1:
            raise HttpError(400, "INVALID_TIMEOUT", "the sandbox would expire before it starts; check the clocks")
        if token.max_lifetime_s and seconds > token.max_lifetime_s + 1:
            raise HttpError(403, "LIFETIME_QUOTA", f"this token allows lifetimes of at most {token.max_lifetime_s} s")
        request.lifetime.duration.FromMilliseconds(round(seconds * 1000))
    if config.allow_net is not None:
        request.network.allow.rules.extend(config.allow_net)
    for name, secret in (config.secrets or {}).items():
        request.secrets[name].value = secret.value
        request.secrets[name].hosts.extend(secret.hosts)
    return request
