"""Limits that requests have to meet, by class, and how the command line writes them.

--slo ttft=500ms,itl=50ms                 of every class that has none of its own
--slo batch:e2e=30s
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from bench.serve.metrics import Slo
from bench.serve.record import RequestRecord
from tandem.errors import ConfigError

UNITS_MS = {"ms": 1.0, "s": 1e3}


@dataclass(frozen=True, slots=True)
class Slos:
    """Limits by class; `default` are those of all others."""

    default: Slo = field(default_factory=Slo)
    by_class: Mapping[str, Slo] = field(default_factory=dict)

    def of(self, request_class: str) -> Slo:
        return self.by_class.get(request_class, self.default)

    def is_met(self, record: RequestRecord) -> bool:
        """By its class' limits. Only a request that was answered meets anything."""
        return self.of(record.request_class).is_met(record)


def parse_slos(texts: Sequence[str]) -> Slos:
    """Limits as the command line has them. Raises `ConfigError`."""
    default, by_class = Slo(), dict[str, Slo]()
    for text in texts:
        name, colon, limits = text.rpartition(":")
        if colon:
            by_class[name] = _parse(limits, by_class.get(name, Slo()), text)
        else:
            default = _parse(limits, default, text)
    return Slos(default, by_class)


def _parse(limits: str, slo: Slo, whole: str) -> Slo:
    known = [one.name.removesuffix("_ms") for one in fields(Slo)]
    for limit in limits.split(","):
        name, _, value = limit.partition("=")
        number = value.rstrip("ms")
        unit = value[len(number) :]
        try:
            if name not in known or float(number) <= 0:
                raise ValueError(limit)
            slo = replace(slo, **{f"{name}_ms": float(number) * UNITS_MS[unit]})
        except (ValueError, KeyError):
            like = f"interactive:ttft=500ms,itl=50ms or e2e=30s, of {', '.join(known)}"
            raise ConfigError(f"limits are like {like}; not {whole}") from None
    return slo
