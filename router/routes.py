"""What routing is told of a request, and what is remembered of where requests went.

The router guesses what is cached by what it has seen go where: prompts that a prefill worker read are in the
store, if that keeps prefixes, and the decode worker of a request has its blocks, if workers keep them.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.admission import STORE, Plan
from router.disaggregation import Cached
from router.policy import Route
from router.prefix_map import PrefixMap
from tandem.config import ClusterConfig
from tandem.request import Request


@dataclass(frozen=True, slots=True)
class Traits:
    """Of one request, found out once: choices are made anew while it waits."""

    request_id: str
    session: str
    beginnings: tuple[bytes, ...]


class Routes:
    """Hashes prompts only where the policy or the placement asks for it."""

    def __init__(self, config: ClusterConfig) -> None:
        piece_tokens, is_auto = config.kvstore.prefix_tokens, config.router.disaggregate == "auto"
        is_kv_aware = config.router.policy == "kv-aware"
        self._keeps_blocks = is_auto and config.cache.keep_blocks
        self._publishes_all = config.kvstore.publish == "all"
        self._piece_tokens = piece_tokens
        self._prefixes = PrefixMap(piece_tokens) if is_kv_aware or self._keeps_blocks else None
        self._stored = PrefixMap(piece_tokens) if is_auto and config.cache.prefix_bytes else None

    def traits(self, request: Request) -> Traits:
        """A session's name counts within its tenant only."""
        session = f"{request.tenant}\n{request.session}" if request.session else ""
        known = self._stored if self._prefixes is None else self._prefixes
        if known is None:
            return Traits(request.request_id, session, ())
        beginnings = known.beginnings(request.tenant, request.token_ids)
        return Traits(request.request_id, session, beginnings)

    def route(self, traits: Traits) -> Route:
        """By what is known now."""
        cached = {} if self._prefixes is None else self._prefixes.cached_tokens(traits.beginnings)
        return Route(traits.request_id, traits.session, cached, self._in_store(traits))

    def cached(self, traits: Traits, decode_worker: str) -> Cached:
        """By what is known now, with that decode worker."""
        at_decode = 0
        wanted = len(traits.beginnings) * self._piece_tokens if self._stored is not None else 0
        if self._keeps_blocks and self._prefixes is not None:
            at_decode = self._prefixes.cached_tokens(traits.beginnings).get(decode_worker, 0)
        return Cached(self._in_store(traits), at_decode, wanted)

    def note(self, traits: Traits, plan: Plan) -> None:
        """The request went this way."""
        if self._prefixes is not None:
            self._prefixes.note(traits.beginnings, plan.decode.worker_id)
        if self._stored is not None and (self._publishes_all or not plan.decision.is_local):
            self._stored.note(traits.beginnings, STORE)

    def _in_store(self, traits: Traits) -> int:
        """Tokens of the prompt."""
        if self._stored is None:
            return 0
        return self._stored.cached_tokens(traits.beginnings).get(STORE, 0)
