"""A worker's engine in one call: threads set, model loaded, block pool sized from a budget in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tandem.config import ClusterConfig
from tandem.engine.block_pool import BlockPool
from tandem.engine.model_runner import ModelRunner
from tandem.errors import ConfigError
from tandem.geometry import ModelGeometry


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model and the books over its cache."""

    model: ModelRunner
    pool: BlockPool
    num_blocks: int
    block_bytes: int  # of the target's KV
    draft: ModelRunner | None = None  # its cache has the same block ids as the target's


def load_engine(
    config: ClusterConfig, pool_name: str, budget_bytes: int, threads: int, draft: Path | None = None
) -> Engine:
    """Load the configured checkpoint, and a draft, with as many KV blocks as the budget holds.

    Raises `ConfigError` if a checkpoint is unusable or the budget is smaller than one block.
    """
    torch.set_num_threads(threads)
    block_bytes = _block_bytes(config, config.model.path)
    num_blocks = budget_bytes // (block_bytes + (_block_bytes(config, draft) if draft else 0))
    if num_blocks < 1:
        raise ConfigError(
            f"{budget_bytes} bytes of KV cache hold no block of {block_bytes} bytes; give the worker more"
        )
    model = _load(config, config.model.path, num_blocks)
    pool = BlockPool(pool_name, num_blocks, config.cache.block_size)
    return Engine(model, pool, num_blocks, block_bytes, _load(config, draft, num_blocks) if draft else None)


def _block_bytes(config: ClusterConfig, path: Path) -> int:
    return ModelGeometry.from_path(path).block_bytes(config.cache.block_size, config.model.dtype)


def _load(config: ClusterConfig, path: Path, num_blocks: int) -> ModelRunner:
    model = ModelRunner.load(
        path,
        dtype=config.model.dtype,
        linear=config.model.linear,
        implementation=config.model.implementation if path == config.model.path else "auto",
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
    )
    model.warm_up()
    return model
