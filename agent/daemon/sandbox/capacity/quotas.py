"""Quotas of tenants: the sandboxes, CPUs and memory that each may occupy on this node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent.common.config.quota import Quota
from agent.common.errors import ResourceExhausted
from agent.common.model import SandboxSpec

OTHER_TENANTS = "*"  # name of the quota for each tenant without its own


class Quotas:
    """Quota per tenant.

    :param texts: quotas as in the settings, by tenant name; that of "*" applies to each other tenant separately.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._quotas = {tenant: Quota.parse(text) for tenant, text in texts.items()}

    def check(self, wanted: Sequence[SandboxSpec], reserved: Sequence[SandboxSpec]) -> None:
        """Check that sandboxes of one tenant fit into its quota beside its `reserved` ones.

        :raises ResourceExhausted: they do not fit (TENANT_QUOTA); the message lists what is short.
        """
        tenant = wanted[0].net.tenant
        quota = self._quotas.get(tenant, self._quotas.get(OTHER_TENANTS))
        if quota is None:
            return
        lacking = quota.lacking([*(spec for spec in reserved if spec.net.tenant == tenant), *wanted])
        if lacking:
            raise ResourceExhausted(
                f"tenant {tenant!r} would exceed its quota ({'; '.join(lacking)}); delete sandboxes of it",
                reason="TENANT_QUOTA",
            )
