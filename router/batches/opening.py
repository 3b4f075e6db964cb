"""The batches of a router that is configured to keep any."""

from __future__ import annotations

from collections.abc import Callable

from router.batches.asking import RouterAsker
from router.batches.run import Model
from router.batches.service import Batches
from router.dispatch import Dispatcher
from router.intake import Intake
from tandem.chat_template import ChatTemplate
from tandem.config import ClusterConfig


def open_batches(
    config: ClusterConfig, fingerprint: str, intake: Intake, dispatcher: Callable[[], Dispatcher]
) -> Batches:
    """In `config.batches.dir`. Raises `ConfigError` if the folder or the template is unusable."""
    template = ChatTemplate.from_dir(config.model.path)

    def asker(tenant: str) -> RouterAsker:
        return RouterAsker(dispatcher(), intake, template, tenant)

    model = Model(config.model.served_name, fingerprint)
    return Batches(config.batches, model, _max_in_flight(config), asker)


def _max_in_flight(config: ClusterConfig) -> int:
    """Half of the places in the queue, and of a tenant's share, are for those who wait for an answer."""
    limits = [config.batches.max_in_flight, config.router.max_queue // 2]
    if config.router.max_requests_per_tenant:
        limits.append(config.router.max_requests_per_tenant // 2)
    return max(1, min(limits))
