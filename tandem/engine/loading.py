"""A worker's engine in one call: threads set, model loaded, block pool sized from a budget in bytes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from tandem.config import ClusterConfig
from tandem.engine.block_pool import BlockPool
from tandem.engine.decoder import best_for_draft
from tandem.engine.model_runner import ModelRunner
from tandem.errors import ConfigError
from tandem.geometry import ModelGeometry
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.quantizations import (
    ACTIVATION_BITS,
    AUTO,
    AUTO_SELF_DRAFT,
    natural_kv_dtype,
    parse_quantization,
)

log = logging.getLogger(__name__)

DRAFT_ACTIVATION_BITS = 8  # of a self-draft in int8, whose weights lie in memory for one width only


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model and the books over its cache."""

    model: ModelRunner
    pool: BlockPool
    num_blocks: int
    block_bytes: int  # of the target's KV
    draft: ModelRunner | None = None  # over a cache with the target's block ids, or over the target's own

    def describe(self) -> str:
        """What runs target and draft and why, as the probes at load found."""
        draft = f"; draft {self.draft.describe()}" if self.draft else ""
        return f"{self.model.describe()}{draft}"

    def worker_info(
        self, worker_id: str, role: pb.WorkerRole.ValueType, fingerprint: bytes, cores: str = ""
    ) -> pb.WorkerInfo:
        """What a worker with this engine, on cores of that name, tells the router, but for its address."""
        return pb.WorkerInfo(
            worker_id=worker_id,
            role=role,
            fingerprint=fingerprint,
            block_size=self.pool.block_size,
            num_blocks=self.num_blocks,
            block_bytes=self.block_bytes,
            takes_bundles=True,
            cores=cores,
        )


def load_engine(
    config: ClusterConfig,
    pool_name: str,
    budget_bytes: int,
    threads: int,
    draft: Path | None = None,
    shares_weights: bool = True,
    kv_dtype: str = "auto",
) -> Engine:
    """Load the configured checkpoint, and a draft, with as many KV blocks of `kv_dtype` (what it
    computes with by default) as the budget holds.

    `draft` is a draft model's checkpoint; without one the target's own weights may draft, unless
    `shares_weights` is False.

    Raises `ConfigError` if a checkpoint is unusable or the budget is smaller than one block.
    """
    torch.set_num_threads(threads or 1)
    check_device(config.model.device)
    natural = natural_kv_dtype(*parse_quantization(config.model.quantization), config.model.dtype)
    held = natural if kv_dtype == "auto" else kv_dtype
    block_bytes = _block_bytes(config, config.model.path, held)
    num_blocks = budget_bytes // (block_bytes + (_block_bytes(config, draft, held) if draft else 0))
    if num_blocks < 1:
        raise ConfigError(
            f"{budget_bytes} bytes of KV cache hold no block of {block_bytes} bytes; give the worker more"
        )
    model = _load(config, config.model.path, num_blocks, held, config.model.quantization)
    model.warm_up()
    pool = BlockPool(pool_name, num_blocks, config.cache.block_size)
    log.info("%s runs by %s", config.model.served_name, model.describe())
    drafting = _draft(config, model, draft, num_blocks, held) if draft or shares_weights else None
    if drafting is not None:
        log.info("its draft runs by %s", drafting.describe())
    return Engine(model, pool, num_blocks, block_bytes, drafting)


def check_device(name: str) -> None:
    """Raise `ConfigError` unless torch can compute on it here."""
    device = torch.device(name)
    if device.type == "cpu":
        return
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= found:
        raise ConfigError(
            f"model device {name}: torch {torch.__version__} finds {found or 'no'} GPUs here; "
            "install a torch that is built for yours, or set model.device: cpu"
        )


def _draft(
    config: ClusterConfig, target: ModelRunner, path: Path | None, num_blocks: int, kv_dtype: str
) -> ModelRunner | None:
    """A draft model over a cache of its own, or the target's weights in fewer bits over the target's."""
    speculation = config.speculation
    name = speculation.draft_quantization
    if path is not None:
        if name == AUTO:
            where = config.model.dtype, config.model.device
            name = best_for_draft(path, _implementation(config, path), *where)
        model = _load(config, path, num_blocks, kv_dtype, name)
        model.warm_up()
        return model
    if speculation.draft == "self":
        name = AUTO_SELF_DRAFT if name == AUTO else name
        bits = speculation.draft_activation_bits
        width = bits or DRAFT_ACTIVATION_BITS
        model = _load(config, config.model.path, 1, kv_dtype, name, width)
        model = model.over(target.cache)
        return model if bits else model.with_activations_of(0)
    if speculation.draft == "qspec":
        return target.with_activations_of(speculation.draft_activation_bits)
    return None


def _block_bytes(config: ClusterConfig, path: Path, kv_dtype: str) -> int:
    return ModelGeometry.from_path(path).block_bytes(config.cache.block_size, kv_dtype)


def _implementation(config: ClusterConfig, path: Path) -> str:
    """The configured one is the target's."""
    return config.model.implementation if path == config.model.path else "auto"


def _load(
    config: ClusterConfig,
    path: Path,
    num_blocks: int,
    kv_dtype: str,
    quantization: str,
    self_draft_bits: int = 0,
) -> ModelRunner:
    """`self_draft_bits` are those of its activations, if it is a draft by the target's weights. Raises
    `ConfigError` where nothing computes with the activations that the quantization's name says."""
    weights, bits = parse_quantization(quantization)
    model = ModelRunner.load(
        path,
        dtype=config.model.dtype,
        kv_dtype=kv_dtype,
        linear=config.model.linear,
        implementation=_implementation(config, path),
        quantization=weights,
        activation_bits=self_draft_bits or bits,
        is_draft=bool(self_draft_bits),
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        device=config.model.device,
    )
    if bits != ACTIVATION_BITS and model.implementation != "native":
        raise ConfigError(
            f"{quantization} needs our own kernels, and {path} runs by {model.implementation} here "
            f"({model.implementation_reason}): take {weights}"
        )
    return model
