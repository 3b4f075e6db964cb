"""What `tandem serve` says when it is ready."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from deploy.commands.serve import say_serving
from tandem.config import ClusterConfig, ModelConfig

BF16 = "native (kernels for avx512bf16): 30 native-fp16"


@pytest.mark.parametrize(
    ("kernels", "quantization", "is_told"),
    [
        (BF16, "none", True),
        (BF16, "bf16", False),
        (BF16, "int8-a8", False),
        ("native (kernels for avx512): 30 native-fp16", "none", False),
        ("lean (no own kernels: TANDEM_NATIVE is off): 30 fp16", "none", False),
    ],
)
def test_who_could_multiply_bfloat16_is_told_of_it(kernels, quantization, is_told):
    config = ClusterConfig(model=ModelConfig(quantization=quantization))
    service = SimpleNamespace(
        address="127.0.0.1:1", http_address="", config=config, kernels={"decode-0": kernels}
    )
    said = io.StringIO()
    say_serving(service, 1.25, Console(file=said, width=200))
    assert "serving on 127.0.0.1:1 (gRPC), ready in 1.2 s" in said.getvalue()
    assert f"decode-0: {kernels}" in said.getvalue()
    assert ("--quantization bf16" in said.getvalue()) == is_told
