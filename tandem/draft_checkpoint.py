"""Which draft model goes with the target, if it fits, or a clear refusal."""

from __future__ import annotations

import logging
from pathlib import Path

from tandem.config import ClusterConfig
from tandem.errors import ConfigError
from tandem.fingerprint import checkpoint_digest, tokenizer_digest
from tandem.geometry import ModelGeometry

log = logging.getLogger(__name__)


def usable_draft(config: ClusterConfig) -> Path | None:
    """The draft's checkpoint if it speaks the target's tokens.

    Raises `ConfigError` with both fingerprints if it does not; where speculation is not required,
    logs the same and decodes plainly.
    """
    path = config.speculation.draft_path
    if path is None:
        return None
    try:
        _check_pair(config.model.path, path)
    except ConfigError as error:
        if config.speculation.required:
            raise
        log.warning("decoding without speculation: %s", error)
        return None
    return path


def _check_pair(target: Path, draft: Path) -> None:
    sizes = [ModelGeometry.from_path(path).vocab_size for path in (target, draft)]
    if sizes[0] != sizes[1] or tokenizer_digest(target) != tokenizer_digest(draft):
        names = [checkpoint_digest(path).hex()[:16] for path in (target, draft)]
        raise ConfigError(
            f"draft {names[1]} ({sizes[1]} tokens) does not share the vocabulary of target {names[0]} "
            f"({sizes[0]} tokens); use a draft trained with the target's tokenizer"
        )
