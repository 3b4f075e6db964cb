"""From configuration to a decoder: which draft, and how far it looks ahead."""

from __future__ import annotations

from decode_worker.auto_lookahead import AutoLookahead
from decode_worker.decoder import Decoder, PlainDecoder
from decode_worker.drafts.draft import Draft
from decode_worker.drafts.model import ModelDraft
from decode_worker.drafts.ngram import NgramDraft
from decode_worker.drafts.shared import SharedDraft
from decode_worker.lookahead import ConstantLookahead, HeuristicLookahead, Lookahead
from decode_worker.speculative import SpeculativeDecoder
from decode_worker.step_costs import StepCosts
from tandem.config import SpeculationConfig
from tandem.engine.costs import measure_costs
from tandem.engine.loading import Engine

TYPICAL_DEPTH = 3  # draft tokens at which a draft's forward is timed


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
    drafting = measure_costs(engine.draft, depth=TYPICAL_DEPTH) if engine.draft else None
    costs = StepCosts(measure_costs(engine.model), drafting)
    return SpeculativeDecoder(engine.model, draft, _lookahead(config, costs), costs)


def _lookahead(config: SpeculationConfig, costs: StepCosts) -> Lookahead:
    if not config.num_assistant_tokens:
        return AutoLookahead(config.max_assistant_tokens, costs)
    is_heuristic = config.num_assistant_tokens_schedule == "heuristic"
    return HeuristicLookahead(config) if is_heuristic else ConstantLookahead(config)
