"""Denials of sandboxes: counted in their records and in the metrics, and published to watchers."""

from __future__ import annotations

from collections.abc import Callable

from agent.common.policy.reasons import Denial, Reason
from agent.common.telemetry import EGRESS_DENIALS
from agent.daemon.sandbox.state.record import Record


class Denials:
    """Receiver of denials by sandbox id (`agent.daemon.network.sandbox_network.DenialSink`).

    :param publish: called with the record and each denial that comes with details.
    """

    def __init__(self, publish: Callable[[Record, Denial], None]) -> None:
        self._publish = publish
        self._records: dict[str, Record] = {}

    def track(self, record: Record) -> None:
        """Count denials of this sandbox in its record from now on."""
        self._records[record.id] = record

    def untrack(self, sandbox_id: str) -> None:
        """Stop counting in the record of a sandbox. Idempotent."""
        self._records.pop(sandbox_id, None)

    def tracks(self, sandbox_id: str) -> bool:
        """Whether denials of this sandbox are counted in a record."""
        return sandbox_id in self._records

    def count(self, sandbox_id: str, reason: Reason, count: int) -> None:
        """Count denials in the metric, and in the record if the sandbox is tracked."""
        EGRESS_DENIALS.labels(reason.value).inc(count)
        record = self._records.get(sandbox_id)
        if record is not None:
            record.denials[reason.value] = record.denials.get(reason.value, 0) + count

    def report(self, sandbox_id: str, denial: Denial) -> None:
        """Publish a denial of a tracked sandbox."""
        record = self._records.get(sandbox_id)
        if record is not None:
            self._publish(record, denial)
