"""Where the prompt of each admitted request is computed, and what is learnt from how that went."""

from __future__ import annotations

from collections.abc import Collection

from router.admission import STORE, Admission, Plan
from router.disaggregation import STAY, Disaggregation
from router.policy import Route
from router.routes import Routes, Traits
from tandem.config import ClusterConfig
from tandem.metrics import RouterMetrics
from tandem.request import Request, Timings


class Placement:
    """Owned by the event loop. Every placed plan is ended once."""

    def __init__(self, config: ClusterConfig, admission: Admission, metrics: RouterMetrics) -> None:
        router = config.router
        self._admission = admission
        self._metrics = metrics
        self._routes = Routes(config)
        self._disaggregation = Disaggregation(
            router.disaggregate, router.local_prefill_tokens, router.itl_limit_s
        )
        self._store_fallback = router.store_fallback

    def traits(self, request: Request) -> Traits:
        return self._routes.traits(request)

    def route(self, traits: Traits) -> Route:
        """What the choice of workers may know of a request."""
        return self._routes.route(traits)

    def place(self, plan: Plan, traits: Traits, exclude: Collection[str]) -> Plan:
        """Split, or stay with the decode worker. `exclude` names whom an earlier attempt met in vain."""
        worker_id, tokens = plan.decode.worker_id, plan.needs.prefill_tokens
        cached = self._routes.cached(traits, worker_id)
        queue = self._admission.queued_before(plan)
        shares = plan.prefill is not None and plan.prefill.cores == plan.decode.cores != ""
        token_s = self._admission.load_of(worker_id).prompt_token_s
        decision = self._disaggregation.decide(
            tokens, queue, worker_id, cached, shares_cores=shares, token_s=token_s
        )
        if plan.prefill is None:
            decision = plan.decision
        elif self._store_fallback and STORE in exclude:
            decision = STAY
        loads, prompt_tokens = self._disaggregation.loads, 0
        if decision.is_local:
            prompt_tokens = cached.left_at_decode(tokens)
            queue = loads.tokens_before(worker_id, prompt_tokens)
        loads.begin(worker_id, plan.attempt, prompt_tokens)
        self._metrics.note_placed(decision.name)
        placed = self._admission.place(plan, decision, queue, cached.at_decode)
        self._routes.note(traits, placed)
        return placed

    def computed(self, plan: Plan) -> None:
        """The first token has come from the decode worker: its prompt keeps nobody waiting any more."""
        self._disaggregation.loads.computed(plan.attempt)

    def end(self, plan: Plan) -> None:
        """The request has left its workers."""
        self._disaggregation.loads.end(plan.decode.worker_id, plan.attempt)

    def learn(self, plan: Plan, timings: Timings, num_restored: int) -> None:
        """An attempt has gone well, and this is what its stages took. So many tokens came from a store."""
        tokens = plan.needs.prefill_tokens - num_restored
        if plan.decision.is_local:
            tokens -= plan.num_kept
        elif not timings.kv_read_ms:  # ended by its first token
            return
        self._disaggregation.note(plan.decision, plan.queued_before + max(tokens, 1), timings)
