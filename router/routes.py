"""What the routing policy is told of a request, and what is remembered of where requests went."""

from __future__ import annotations

from dataclasses import dataclass

from router.admission import Plan
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
    """Hashes prompts only for the policy that asks for it."""

    def __init__(self, config: ClusterConfig) -> None:
        knows_kv = config.router.policy == "kv-aware"
        self._prefixes = PrefixMap(config.kvstore.prefix_tokens) if knows_kv else None

    def traits(self, request: Request) -> Traits:
        """A session's name counts within its tenant only."""
        session = f"{request.tenant}\n{request.session}" if request.session else ""
        if self._prefixes is None:
            return Traits(request.request_id, session, ())
        beginnings = self._prefixes.beginnings(request.tenant, request.token_ids)
        return Traits(request.request_id, session, beginnings)

    def route(self, traits: Traits) -> Route:
        """By what is known now."""
        cached = {} if self._prefixes is None else self._prefixes.cached_tokens(traits.beginnings)
        return Route(traits.request_id, traits.session, cached)

    def note(self, traits: Traits, plan: Plan) -> None:
        """The request went this way."""
        if self._prefixes is not None:
            self._prefixes.note(traits.beginnings, plan.decode.worker_id)
