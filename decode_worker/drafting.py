"""From configuration to a decoder: which draft, if it fits the target, or a clear refusal."""

from __future__ import annotations

import logging
from pathlib import Path

from decode_worker.auto_lookahead import AutoLookahead
from decode_worker.decoder import Decoder, PlainDecoder
from decode_worker.drafts.draft import Draft
from decode_worker.drafts.model import ModelDraft
from decode_worker.drafts.ngram import NgramDraft
from decode_worker.drafts.shared import SharedDraft
from decode_worker.lookahead import ConstantLookahead, HeuristicLookahead, Lookahead
from decode_worker.speculative import SpeculativeDecoder
from decode_worker.step_costs import StepCosts
from tandem.config import ClusterConfig, SpeculationConfig
from tandem.engine.costs import measure_costs
from tandem.engine.loading import Engine
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


def make_decoder(config: SpeculationConfig, engine: Engine) -> Decoder:
    """Plain, or speculative with the configured draft."""
    draft: Draft
    if config.draft == "ngram":
        draft = NgramDraft()
    elif engine.draft is not None and config.draft in ("self", "qspec"):
        draft = SharedDraft(engine.draft, config.assistant_confidence_threshold)
    elif engine.draft is not None:
        draft = ModelDraft(engine.draft, config.assistant_confidence_threshold)
    else:
        return PlainDecoder(engine.model)
    # Costs are measured now, before anybody owns a block.
    costs = StepCosts(measure_costs(engine.model), measure_costs(engine.draft) if engine.draft else None)
    return SpeculativeDecoder(engine.model, draft, _lookahead(config, costs), costs)


def _lookahead(config: SpeculationConfig, costs: StepCosts) -> Lookahead:
    if not config.num_assistant_tokens:
        return AutoLookahead(config.max_assistant_tokens, costs)
    is_heuristic = config.num_assistant_tokens_schedule == "heuristic"
    return HeuristicLookahead(config) if is_heuristic else ConstantLookahead(config)


def _check_pair(target: Path, draft: Path) -> None:
    sizes = [ModelGeometry.from_path(path).vocab_size for path in (target, draft)]
    if sizes[0] != sizes[1] or tokenizer_digest(target) != tokenizer_digest(draft):
        names = [checkpoint_digest(path).hex()[:16] for path in (target, draft)]
        raise ConfigError(
            f"draft {names[1]} ({sizes[1]} tokens) does not share the vocabulary of target {names[0]} "
            f"({sizes[0]} tokens); use a draft trained with the target's tokenizer"
        )
