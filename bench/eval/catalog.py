"""All experiments, in the order in which `tandem eval all` runs them."""

from __future__ import annotations

from importlib import import_module

from bench.eval.experiment import Experiment

MODULES = {  # by the name of the command
    "speculation": "speculation",
    "quantized-pairs": "quantized_pairs",
    "quantization": "quantization",
    "gamma": "gamma",
    "qspec": "qspec",
    "quality": "quality",
    "forward": "forward",
    "split": "split",
}


def experiment(name: str) -> Experiment:
    """Its module is imported now, and with it torch."""
    found: Experiment = import_module(f"bench.eval.{MODULES[name]}")
    return found
