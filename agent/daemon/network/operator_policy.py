"""Operator's part of the network policy: rules and limits of the section [egress], parsed once at start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agent.common.config.egress import EgressSettings
from agent.common.model import NetSpec
from agent.common.policy.addresses import IpRange, parse_network
from agent.common.policy.policy import EgressLimits, Policy
from agent.common.policy.rules import Rule, parse_rules


@dataclass(frozen=True, slots=True)
class OperatorPolicy:
    """Rules that restrict or extend the list of every sandbox.

    :param tenants: ceiling of each tenant that has one, by its name.
    :param permitted: private address ranges that sandboxes may reach.
    """

    always: tuple[Rule, ...]
    deny: tuple[Rule, ...]
    tenants: Mapping[str, tuple[Rule, ...]]
    permitted: tuple[IpRange, ...]
    limits: EgressLimits

    @classmethod
    def from_settings(cls, settings: EgressSettings) -> OperatorPolicy:
        """Parse the rules of the settings file.

        :raises InvalidSpec: a rule is malformed; `EgressSettings.check` refuses such settings before.
        """
        return cls(
            always=parse_rules(settings.always, "egress.always"),
            deny=parse_rules(settings.deny, "egress.deny"),
            tenants={
                tenant: parse_rules((text for text in texts.split(",") if text.strip()), f"egress.tenants.{tenant}")
                for tenant, texts in settings.tenants.items()
            },
            permitted=tuple(parse_network(text) for text in settings.permit_private),
            limits=EgressLimits(settings.connections, settings.connections_per_s, settings.bytes_per_s),
        )

    def effective(self, net: NetSpec) -> Policy:
        """Return the policy of a sandbox: its own list within the operator's rules."""
        return Policy(
            allow=net.allow,
            always=self.always,
            ceiling=self.tenants.get(net.tenant),
            deny=self.deny,
            permitted=self.permitted,
            inspect=net.inspect,
            limits=self.limits,
        )
