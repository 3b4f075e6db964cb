"""A worker's engine in one call: threads set, model loaded, block pool sized from a budget in bytes."""

from __future__ import annotations

from dataclasses import dataclass

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
    block_bytes: int


def load_engine(config: ClusterConfig, pool_name: str, budget_bytes: int, threads: int) -> Engine:
    """Load the configured checkpoint with as many KV blocks as the budget holds.

    Raises `ConfigError` if the checkpoint is unusable or the budget is smaller than one block.
    """
    torch.set_num_threads(threads)
    geometry = ModelGeometry.from_path(config.model.path)
    block_bytes = geometry.block_bytes(config.cache.block_size, config.model.dtype)
    num_blocks = budget_bytes // block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"{budget_bytes} bytes of KV cache hold no block of {block_bytes} bytes; give the worker more"
        )
    model = ModelRunner.load(
        config.model.path,
        dtype=config.model.dtype,
        linear=config.model.linear,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
    )
    model.warm_up()
    return Engine(model, BlockPool(pool_name, num_blocks, config.cache.block_size), num_blocks, block_bytes)
