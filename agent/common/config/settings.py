"""All settings of the programs, and the checks across sections."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from agent.common.config.addresses import split_address
from agent.common.config.daemon import (
    ApiSettings,
    CgroupSettings,
    ImageSettings,
    LogSettings,
    MetricsSettings,
    NodeSettings,
    PathSettings,
    SandboxSettings,
    TemplateSettings,
    TracingSettings,
    VmmSettings,
)
from agent.common.config.egress import EgressSettings
from agent.common.config.gateway import GatewaySettings
from agent.common.config.quota import Quota
from agent.common.errors import ConfigError

_FIRST_UID, _LAST_UID = 100_000, (1 << 32) - 2  # below are system users; 2**32 - 1 means "unchanged" to setresuid(2)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings; each field is a section of the settings file."""

    node: NodeSettings = field(default_factory=NodeSettings)
    paths: PathSettings = field(default_factory=PathSettings)
    images: ImageSettings = field(default_factory=ImageSettings)
    api: ApiSettings = field(default_factory=ApiSettings)
    vmm: VmmSettings = field(default_factory=VmmSettings)
    cgroups: CgroupSettings = field(default_factory=CgroupSettings)
    templates: TemplateSettings = field(default_factory=TemplateSettings)
    sandbox: SandboxSettings = field(default_factory=SandboxSettings)
    egress: EgressSettings = field(default_factory=EgressSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    tracing: TracingSettings = field(default_factory=TracingSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    log: LogSettings = field(default_factory=LogSettings)


def check(settings: Settings) -> None:
    """Check ranges, formats and combinations that the types of the fields do not.

    :raises ConfigError: a value is not valid; the message names it.
    """
    for table in dataclasses.fields(settings):
        values = getattr(settings, table.name)
        for entry in dataclasses.fields(values):
            value = getattr(values, entry.name)
            if isinstance(value, int | float) and value < 0:
                raise ConfigError(f"{table.name}.{entry.name} must not be negative")
    _check_users(settings.vmm)
    for tenant, text in settings.node.quotas.items():
        try:
            Quota.parse(text)
        except ValueError as error:
            raise ConfigError(f"node.quotas.{tenant}: {error}") from None
    try:
        settings.egress.check()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    api = settings.api
    api.group_ids()
    if api.tcp_address and not (api.tls_cert and api.tls_key and api.tls_client_ca) and not api.allow_insecure_loopback:
        raise ConfigError(
            "api.tcp_address needs api.tls_cert, api.tls_key and api.tls_client_ca (mutual TLS); "
            "for tests on this machine alone set api.allow_insecure_loopback = true"
        )
    split_address(api.tcp_address, "api.tcp_address")
    split_address(settings.metrics.address, "metrics.address")
    for name in ("address", "ingress_address", "ssh_address", "metrics_address"):
        split_address(getattr(settings.gateway, name), f"gateway.{name}")


def _check_users(vmm: VmmSettings) -> None:
    if vmm.uid_base and not _FIRST_UID <= vmm.uid_base <= _LAST_UID - (1 << 16):
        raise ConfigError(
            f"vmm.uid_base is {vmm.uid_base}; it must be 0, or from {_FIRST_UID} on with 65,536 users after it"
        )
