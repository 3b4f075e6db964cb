"""Settings are checked when built, unknown keys are errors, and a tree survives JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tandem.config import (
    MIB,
    CacheConfig,
    ClusterConfig,
    DecodeConfig,
    KvStoreConfig,
    ModelConfig,
    PrefillConfig,
    RouterConfig,
)
from tandem.errors import ConfigError

PARTS = [ModelConfig, CacheConfig, PrefillConfig, DecodeConfig, KvStoreConfig, RouterConfig]


@pytest.mark.parametrize("part", PARTS)
def test_the_defaults_are_valid_and_frozen(part):
    config = part()
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, None)


def test_a_tree_survives_json():
    config = ClusterConfig.from_dict(
        {
            "model": {"path": "some/folder", "dtype": "bfloat16"},
            "cache": {"block_size": 32},
            "router": {"max_queue": 7, "aging_s": 3},
        }
    )
    assert config.model.path == Path("some/folder")
    assert config.router.aging_s == 3.0
    assert isinstance(config.router.aging_s, float)
    assert ClusterConfig.from_json(config.to_json()) == config


def test_the_default_tree_is_the_empty_mapping():
    assert ClusterConfig.from_dict({}) == ClusterConfig()
    assert ClusterConfig.from_json(ClusterConfig().to_json()) == ClusterConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "unknown setting modle; known: batches, cache, "),
        ({"router": {"max_queues": 1}}, "unknown setting router.max_queues; known: aging_s, "),
        ({"router": 5}, "router must be a mapping"),
        ([], "the configuration must be a mapping"),
        ({"router": {"max_queue": "7"}}, "router.max_queue must be of type int, not str"),
        ({"router": {"max_queue": True}}, "router.max_queue must be of type int, not bool"),
        ({"router": {"max_queue": 1.5}}, "router.max_queue must be of type int, not float"),
        ({"router": {"aging_s": True}}, "router.aging_s must be of type float, not bool"),
        ({"model": {"name": 3}}, "model.name must be of type str, not int"),
    ],
)
def test_what_cannot_be_read_is_named(values, message):
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.from_dict(values)
    assert str(caught.value).startswith(message)


POSITIVE = [
    (part, field.name)
    for part in PARTS
    for field in dataclasses.fields(part)
    if isinstance(field.default, int | float) and not isinstance(field.default, bool) and field.default > 0
]


@pytest.mark.parametrize(("part", "name"), POSITIVE)
def test_no_size_or_time_may_be_negative(part, name):
    with pytest.raises(ConfigError, match=name.replace("_", ".")):
        part(**{name: -1})


@pytest.mark.parametrize(
    ("part", "values"),
    [
        (ModelConfig, {"dtype": "int8"}),
        (ModelConfig, {"device": "tpu"}),
        (ModelConfig, {"device": "cuda:"}),
        (ModelConfig, {"device": "cpu:1"}),
        (ModelConfig, {"linear": "fast"}),
        (CacheConfig, {"block_size": 0}),
        (CacheConfig, {"block_size": 24}),
        (PrefillConfig, {"bucket_tolerance": 1.1}),
        (PrefillConfig, {"token_budget": 0}),
        (DecodeConfig, {"max_batch": 0}),
        (KvStoreConfig, {"chunk_bytes": 4 * MIB + 1}),
        (RouterConfig, {"port": 65_536}),
        (RouterConfig, {"port": -1}),
    ],
)
def test_values_that_cannot_work_are_refused(part, values):
    with pytest.raises(ConfigError):
        part(**values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kvstore": {"publish": "everything"}}, "publish must be prompt or all"),
        ({"kvstore": {"overlap": "never"}}, "overlap must be auto or always, not never"),
        ({"kvstore": {"publish": "all"}}, "needs room for what is published: set cache.prefix_bytes"),
        ({"kvstore": {"publish": "all", "codec": "int8"}}, "publish all needs codec raw"),
        ({"kvstore": {"codec": "int8"}, "cache": {"keep_blocks": True}}, "keep_blocks needs codec raw"),
    ],
)
def test_outputs_are_used_again_only_where_that_can_work(values, says):
    with pytest.raises(ConfigError, match=says):
        ClusterConfig.from_dict(values)
    values = {"kvstore": {"publish": "all"}, "cache": {"prefix_bytes": MIB}}
    assert ClusterConfig.from_dict(values).kvstore.publish == "all"


def test_limits_themselves_are_allowed():
    CacheConfig(block_size=64)
    PrefillConfig(bucket_tolerance=0, max_wait_s=0)
    KvStoreConfig(chunk_bytes=4 * MIB)
    RouterConfig(port=65_535)


def test_a_model_is_called_by_its_name_or_its_folder():
    assert ModelConfig().served_name == "tandem-8m"
    assert ModelConfig(path=Path("models/some-model")).served_name == "some-model"
    assert ModelConfig(path=Path("models/some-model"), name="mine").served_name == "mine"
