"""`tandem verify`: does KV arrive as it was computed? Digests end to end, and logits against a recompute."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.local import LocalCluster
from deploy.verify.arms import Arm, Findings, Verification, reach
from deploy.verify.local import Local
from tandem.config import ClusterConfig, SpeculationConfig
from tandem.errors import ConfigError
from tandem.internal import InternalPlane

SPARE_AREAS = 2
MIN_BLOCKS = 4  # of the longest prompt; the shortest has half of it, and blocks to exchange


@dataclass(frozen=True, slots=True)
class Size:
    """How much is compared."""

    num_prompts: int
    num_tokens: int  # of the longest prompt
    num_forced: int  # behind each


def run(config: ClusterConfig, server: str | None, codecs: Sequence[str], size: Size, as_json: bool) -> bool:
    """Verify the service at that internal address, or one of its own per codec; whether all is well."""
    if size.num_tokens < MIN_BLOCKS * config.cache.block_size:
        raise ConfigError(f"prompts need {MIN_BLOCKS * config.cache.block_size} tokens at least")
    findings = asyncio.run(collect(config, server, codecs, size))
    if as_json:
        print(json.dumps(_document(config, findings)))
    else:
        _show(findings, Console())
    return findings.is_sound


async def collect(config: ClusterConfig, server: str | None, codecs: Sequence[str], size: Size) -> Findings:
    """Draw sequences from the model, compute them here, and compare."""
    plane = InternalPlane.of(config)
    if server is not None:
        await reach(server, plane)
    local = Local(config, size.num_prompts + SPARE_AREAS, size.num_tokens + size.num_forced)
    samples = local.samples(size.num_prompts, size.num_tokens, size.num_forced)
    verification = Verification(local, samples, plane)
    if server is not None:
        await verification.service(config, server)
        return verification.findings
    for codec in codecs:
        async with LocalCluster(_alone(config, codec)) as cluster:
            await verification.service(cluster.config, cluster.router.internal_address)
    return verification.findings


def _alone(config: ClusterConfig, codec: str) -> ClusterConfig:
    """The settings of a service for nobody else: free ports, no draft, this codec."""
    return replace(
        config,
        kvstore=replace(config.kvstore, codec=codec, publish="prompt"),
        router=replace(config.router, host="127.0.0.1", port=0, http_port=None),
        speculation=SpeculationConfig(),
    )


def _document(config: ClusterConfig, findings: Findings) -> dict[str, Any]:
    return {
        "is_sound": findings.is_sound,
        "model": config.model.served_name,
        "arms": [_row(arm, findings) for arm in findings.arms],
        "flips": {"tried": findings.num_flips, "noticed": findings.num_noticed},
    }


def _row(arm: Arm, findings: Findings) -> dict[str, Any]:
    drift = arm.drift
    return {
        "arm": arm.name,
        "codec": arm.codec,
        "dtypes": arm.dtypes,
        "of": arm.of,
        "places": drift.num_places,
        "max_abs": drift.max_abs,
        "mean_abs": drift.mean_abs,
        "agreement": drift.agreement,
        "is_finite": drift.is_finite,
        "is_ok": findings.passes(arm),
    }


def _show(findings: Findings, console: Console) -> None:
    table = Table(title="KV against a recompute", title_justify="left", box=None, pad_edge=False)
    for name in ("what", "codec", "tokens", "max |Δ|", "mean |Δ|", "same", ""):
        table.add_column(name, justify="left" if name in ("what", "codec", "") else "right", no_wrap=True)
    for arm in findings.arms:
        drift = arm.drift
        figures = (f"{drift.max_abs:.3g}", f"{drift.mean_abs:.3g}", f"{drift.agreement:.2%}")
        table.add_row(arm.name, arm.codec, str(drift.num_places), *figures, _verdict(arm, findings))
    console.print(table)
    for dtypes in {arm.dtypes for arm in findings.travelled if arm.dtypes}:
        console.print(f"\nKV is rounded on its way, prefill → decode: {dtypes}")
    console.print("\nΔ of logits; at decode workers of the log-probabilities of what they chose")
    console.print(f"one bit wrong: noticed {findings.num_noticed} of {findings.num_flips} times")
    sound = "KV arrives as it was computed" if findings.is_sound else "[red]KV does not arrive as it was[/]"
    console.print(sound)


def _verdict(arm: Arm, findings: Findings) -> str:
    is_ok = findings.passes(arm)
    if arm in findings.wrong:
        return "noticed" if is_ok else "[red]not noticed[/]"
    if not is_ok:
        return "[red]wrong[/]"
    return "bit-equal" if arm.drift.max_abs == 0 else "ok"
