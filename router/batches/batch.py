"""One batch: what was asked for, how far it is, and OpenAI's object of it.

VALIDATING → IN_PROGRESS → FINALIZING → COMPLETED
    │            ├→ CANCELLING → CANCELLED
    │            └→ EXPIRED
    ├→ CANCELLED, EXPIRED
    └→ FAILED      nothing of it can be run
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any


class BatchStatus(Enum):
    """OpenAI's words."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def has_ended(self) -> bool:
        return self in (self.COMPLETED, self.FAILED, self.EXPIRED, self.CANCELLED)


TRANSITIONS = {
    BatchStatus.VALIDATING: {
        BatchStatus.IN_PROGRESS,
        BatchStatus.CANCELLING,
        BatchStatus.FAILED,
        BatchStatus.EXPIRED,
    },
    BatchStatus.IN_PROGRESS: {
        BatchStatus.FINALIZING,
        BatchStatus.CANCELLING,
        BatchStatus.FAILED,
        BatchStatus.EXPIRED,
    },
    BatchStatus.FINALIZING: {BatchStatus.COMPLETED},
    BatchStatus.CANCELLING: {BatchStatus.CANCELLED},
}


@dataclass(frozen=True, slots=True)
class Batch:
    """What is kept of a batch on disk. Times are seconds of the wall clock."""

    id: str
    tenant: str
    endpoint: str
    window: str  # as it was asked for
    expires_s: int
    entered_s: dict[str, int]  # when each status began
    input_file_id: str = ""  # empty: its requests have yet to be submitted
    metadata: dict[str, str] = field(default_factory=dict)
    status: BatchStatus = BatchStatus.VALIDATING
    total: int = 0
    completed: int = 0
    failed: int = 0
    model: str = ""
    model_fingerprint: str = ""
    errors: list[dict[str, Any]] = field(default_factory=list)
    output_file_id: str = ""
    error_file_id: str = ""

    @property
    def created_s(self) -> int:
        return self.entered_s[BatchStatus.VALIDATING.value]

    def to(self, status: BatchStatus, now_s: float, **changes: Any) -> Batch:
        """The batch in its next status; there are no other ways than `TRANSITIONS`."""
        assert status in TRANSITIONS[self.status], (self.status, status)
        entered_s = {**self.entered_s, status.value: int(now_s)}
        return replace(self, status=status, entered_s=entered_s, **changes)

    def to_json(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        at = {f"{status.value}_at": self.entered_s.get(status.value) for status in BatchStatus}
        del at["validating_at"]
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.window,
            "status": self.status.value,
            "output_file_id": self.output_file_id or None,
            "error_file_id": self.error_file_id or None,
            "created_at": self.created_s,
            "expires_at": self.expires_s,
            **at,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata or None,
            "model": self.model or None,
        }

    def to_record(self) -> dict[str, Any]:
        """Plain values, to be kept."""
        return {name: getattr(self, name) for name in self.__slots__} | {"status": self.status.value}

    @classmethod
    def from_record(cls, values: dict[str, Any]) -> Batch:
        return cls(**{**values, "status": BatchStatus(values["status"])})
