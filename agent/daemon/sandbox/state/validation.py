"""Validation of requests against the limits of the API and of this node. Every message says what to do."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from agent.common.config.daemon import SandboxSettings
from agent.common.errors import InvalidSpec, InvalidState
from agent.common.model import Lifetime, NetSpec, SandboxSpec, SecretSpec
from agent.daemon.storage.disks import MIN_DISK_BYTES

MIB = 1 << 20
MAX_ENV_VARIABLES = 1024
MAX_ENV_BYTES = 128 << 10
MAX_LABELS = 64
MAX_LABEL_VALUE_BYTES = 256
MAX_SECRETS = 64
MAX_SECRET_BYTES = 16 << 10
MAX_TENANT_CHARACTERS = 128
MAX_MOUNTS = 8
_NO_MOUNTS = frozenset({"", "dev", "proc", "sys", "run", "overlay", "newroot", "bin", "etc", "lib", "sbin", "usr"})
MAX_LIFETIME_S = 10 * 365 * 86400.0
_LABEL_KEY = re.compile(r"[a-zA-Z0-9._/-]{1,63}")
_IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_OPEN = NetSpec()
_REQUEST_ID = re.compile(r"[a-zA-Z0-9._-]*")
_MAX_REQUEST_ID = 128


def check_env(env: Mapping[str, str]) -> None:
    """Check environment variables.

    :raises InvalidSpec: too many variables, too many bytes, or names that no shell can set.
    """
    if len(env) > MAX_ENV_VARIABLES:
        raise InvalidSpec(f"env has {len(env)} variables; at most {MAX_ENV_VARIABLES} are allowed: write a file")
    size = sum(len(name.encode()) + len(value.encode()) + 2 for name, value in env.items())
    if size > MAX_ENV_BYTES:
        raise InvalidSpec(f"env has {size} bytes; at most {MAX_ENV_BYTES} are allowed: write a file instead")
    for name, value in env.items():
        if not name or "=" in name or "\0" in name:
            raise InvalidSpec(f"environment variable name {name[:80]!r} is empty or has '=' or NUL in it")
        if "\0" in value:
            raise InvalidSpec(f"the value of environment variable {name[:80]!r} has NUL in it")


def check_labels(labels: Mapping[str, str]) -> None:
    """Check labels.

    :raises InvalidSpec: too many labels, an invalid key, or a value that is too long.
    """
    if len(labels) > MAX_LABELS:
        raise InvalidSpec(f"{len(labels)} labels; at most {MAX_LABELS} are allowed")
    for key, value in labels.items():
        if _LABEL_KEY.fullmatch(key) is None:
            raise InvalidSpec(f"label key {key[:80]!r} is not valid; use 1 to 63 of a-z A-Z 0-9 . _ / -")
        if len(value.encode()) > MAX_LABEL_VALUE_BYTES:
            raise InvalidSpec(f"the value of label {key!r} is over {MAX_LABEL_VALUE_BYTES} bytes")


def changed_labels(labels: Mapping[str, str], add: Mapping[str, str], remove: Iterable[str]) -> dict[str, str]:
    """Return labels with those of `add` set and those of `remove` deleted.

    :raises InvalidSpec: the result is not valid; see `check_labels`.
    """
    changed = {**labels, **add}
    for key in remove:
        changed.pop(key, None)
    check_labels(changed)
    return changed


def check_expire_time(expire_time: float | None, now: float) -> None:
    """Check an expire time; both times are seconds since 1970.

    :raises InvalidSpec: it is in the past, or over ten years away.
    """
    if expire_time is not None and not 0 < expire_time - now <= MAX_LIFETIME_S:
        raise InvalidSpec("expire_time must be in the future, at most ten years away; to end a sandbox, delete it")


def check_lease_change(expire_time: float | None, *, leased: bool, clear: bool, end_lease: bool) -> None:
    """Check a change of the expire time of a sandbox with or without a lease.

    :raises InvalidSpec: the lease would end without an expire time in its place.
    :raises InvalidState: the sandbox has a lease, which decides when it expires.
    """
    if end_lease and expire_time is None:
        raise InvalidSpec("end_lease needs an expire_time: a sandbox without either would live for ever")
    if leased and not end_lease and (expire_time is not None or clear):
        raise InvalidState(
            "a sandbox with a lease lives by KeepAlive; its expire time cannot be set unless the lease ends"
        )


def check_request_id(request_id: str, limit: int = _MAX_REQUEST_ID) -> None:
    """Check a request_id.

    :raises InvalidSpec: it is too long, or has other characters than a-z A-Z 0-9 . _ -
    """
    if len(request_id) > limit or _REQUEST_ID.fullmatch(request_id) is None:
        raise InvalidSpec(f"request_id is not valid; use 1 to {limit} of a-z A-Z 0-9 . _ -")


def check_lifetime(lifetime: Lifetime) -> None:
    """Check a lifetime.

    :raises InvalidSpec: a time under a second or over ten years.
    """
    given = {"duration": lifetime.duration_s, "lease": lifetime.lease_s, "idle_timeout": lifetime.idle_s}
    for name, seconds in given.items():
        if seconds is not None and not 1 <= seconds <= MAX_LIFETIME_S:
            raise InvalidSpec(f"lifetime.{name} is {seconds:g} s; it must be from 1 s to ten years, or left out")


def check_secrets(secrets: tuple[SecretSpec, ...], env: Mapping[str, str]) -> None:
    """Check the secrets of a sandbox.

    :raises InvalidSpec: too many, a name that is invalid or in `env`, no host, or an address as a host.
    """
    if len(secrets) > MAX_SECRETS:
        raise InvalidSpec(f"{len(secrets)} secrets; at most {MAX_SECRETS} are allowed")
    for secret in secrets:
        what = f"secret {secret.name[:80]!r}"
        if _VARIABLE.fullmatch(secret.name) is None:
            raise InvalidSpec(f"{what}: its name must be an environment variable's: letters, digits and '_'")
        if secret.name in env:
            raise InvalidSpec(f"{what}: env has a variable of this name; remove one of the two")
        if not secret.hosts:
            raise InvalidSpec(f"{what}: name the hosts that may get its value")
        for rule in secret.hosts:
            if rule.network is not None:
                raise InvalidSpec(f"{what}: {rule} is an address; a value goes to hosts with a name and a certificate")


def check_value(name: str, value: str) -> None:
    """Check the value of a secret.

    :raises InvalidSpec: it could not be sent in an HTTP header (RFC 9110, 5.5).
    """
    if not 1 <= len(value.encode()) <= MAX_SECRET_BYTES:
        raise InvalidSpec(f"secret {name[:80]!r}: its value must have 1 to {MAX_SECRET_BYTES} bytes")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise InvalidSpec(f"secret {name[:80]!r}: its value has control characters (a line break?); remove them")


def check_mounts(volumes: tuple[tuple[str, str], ...]) -> None:
    """Check mounts, each a path and a volume.

    :raises InvalidSpec: too many volumes, one volume twice, or a path where nothing can be mounted.
    """
    if len(volumes) > MAX_MOUNTS:
        raise InvalidSpec(f"{len(volumes)} volumes; at most {MAX_MOUNTS} can be mounted")
    if len({volume for _, volume in volumes}) != len(volumes):
        raise InvalidSpec("a volume can be mounted at one path only")
    for path, _ in volumes:
        plain = posixpath.normpath(path)
        top = plain.partition("/")[2].partition("/")[0]
        if not path.startswith("/") or "\0" in path or len(path.encode()) > 4095 or top in _NO_MOUNTS:
            raise InvalidSpec(f"a volume cannot be mounted at {path[:80]!r}; use an absolute path such as /data")


def check_net(net: NetSpec) -> None:
    """Check a network policy, whose rules are parsed already.

    :raises InvalidSpec: the tenant name is too long.
    """
    if len(net.tenant) > MAX_TENANT_CHARACTERS:
        raise InvalidSpec(f"tenant has over {MAX_TENANT_CHARACTERS} characters")


def same_request(one: SandboxSpec, other: SandboxSpec) -> bool:
    """Return whether two specifications are equal apart from placeholders, which are random in each request."""
    return _without_placeholders(one) == _without_placeholders(other)


def _without_placeholders(spec: SandboxSpec) -> SandboxSpec:
    return replace(spec, secrets=tuple(replace(secret, placeholder="") for secret in spec.secrets))


def complete(
    limits: SandboxSettings, *, image: str, vcpu_count: int, memory_bytes: int, disk_bytes: int,
    env: Mapping[str, str], labels: Mapping[str, str], lifetime: Lifetime, request_id: str,
    net: NetSpec = _OPEN, secrets: tuple[SecretSpec, ...] = (), root: str = "",
    volumes: tuple[tuple[str, str], ...] = (),
) -> SandboxSpec:  # fmt: skip
    """Return a valid specification, with the node's defaults for zeros.

    :raises InvalidSpec: a field is out of range, or malformed.
    """
    if _IMAGE_NAME.fullmatch(image) is None:
        raise InvalidSpec(f"image name {image[:80]!r} is not valid; list the images to see which there are")
    check_request_id(request_id)
    vcpus = vcpu_count or limits.default_vcpus
    if not 1 <= vcpus <= limits.max_vcpus:
        raise InvalidSpec(f"vcpus is {vcpus}; it must be from 1 to {limits.max_vcpus}")
    memory = memory_bytes or limits.default_memory_bytes
    if memory < 0 or memory % MIB:
        raise InvalidSpec(f"memory_bytes is {memory}; it must be a positive multiple of 1 MiB ({MIB})")
    if memory > limits.max_memory_bytes:
        raise InvalidSpec(f"memory_bytes is {memory}; this node allows at most {limits.max_memory_bytes}")
    disk = disk_bytes or limits.default_disk_bytes
    if not MIN_DISK_BYTES <= disk <= limits.max_disk_bytes:
        raise InvalidSpec(f"disk_bytes is {disk}; it must be from {MIN_DISK_BYTES} to {limits.max_disk_bytes}")
    check_env(env)
    check_labels(labels)
    check_lifetime(lifetime)
    check_net(net)
    check_secrets(secrets, env)
    check_mounts(volumes)
    return SandboxSpec(
        image=image, vcpu_count=vcpus, memory_bytes=memory, disk_bytes=-(-disk // MIB) * MIB, env=dict(env),
        labels=dict(labels), lifetime=lifetime, request_id=request_id, net=net, secrets=secrets,
        root=root, volumes=volumes,
    )  # fmt: skip
