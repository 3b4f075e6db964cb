"""From configuration to a decoder: which draft, and how far it looks ahead."""

from __future__ import annotations

from decode_worker.auto_lookahead import PRIOR_ACCEPTANCE, AutoLookahead
from decode_worker.decoder import Decoder, PlainDecoder
from decode_worker.drafts.draft import Draft
from decode_worker.drafts.model import ModelDraft
from decode_worker.drafts.ngram import NgramDraft
from decode_worker.drafts.shared import SharedDraft
from decode_worker.lookahead import ConstantLookahead, HeuristicLookahead, Lookahead
from decode_worker.speculative import SpeculativeDecoder
from decode_worker.step_costs import DraftCosts, StepCosts
from tandem.config import SpeculationConfig
from tandem.engine.costs import measure_costs
from tandem.engine.loading import Engine
from tandem.engine.model_runner import ModelRunner

OWN_WEIGHTS_PRIOR = 0.9  # of guesses by the target itself in fewer bits, so many are accepted at least
DEEP = 5  # a guess of so many tokens, beside one of a single token, tells forwards from what each guess costs


def make_decoder(config: SpeculationConfig, engine: Engine) -> Decoder:
    """Plain, or speculative with the configured draft."""
    draft: Draft
    if config.draft == "ngram":
        draft = NgramDraft()
    elif engine.draft is not None and config.draft in ("self", "qspec"):
        draft = SharedDraft(engine.draft.called("draft"), config.assistant_confidence_threshold)
    elif engine.draft is not None:
        draft = ModelDraft(engine.draft.called("draft"), config.assistant_confidence_threshold)
    else:
        return PlainDecoder(engine.model.called("decode"))
    # Costs are measured now, before anybody owns a block.
    costs = StepCosts(measure_costs(engine.model), _draft_costs(engine.draft))
    target = engine.model.called("verify")
    return SpeculativeDecoder(target, draft, _lookahead(config, costs, draft), costs)


def _draft_costs(draft: ModelRunner | None) -> DraftCosts | None:
    if draft is None:
        return None
    if not draft.can_guess:  # Python steps from token to token: there is nothing to start
        return DraftCosts(0.0, measure_costs(draft))
    return DraftCosts.of(measure_costs(draft, depth=1), measure_costs(draft, depth=DEEP), DEEP)


def _lookahead(config: SpeculationConfig, costs: StepCosts, draft: Draft) -> Lookahead:
    if not config.num_assistant_tokens:
        knows = config.draft != "ngram"
        prior = OWN_WEIGHTS_PRIOR if isinstance(draft, SharedDraft) else PRIOR_ACCEPTANCE
        most = config.max_assistant_tokens
        return AutoLookahead(most, costs, draft.num_unread, has_confidence=knows, prior=prior)
    is_heuristic = config.num_assistant_tokens_schedule == "heuristic"
    return HeuristicLookahead(config) if is_heuristic else ConstantLookahead(config)
