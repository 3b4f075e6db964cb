"""What a draft is quantized to where nobody says."""

import json
import shutil

import pytest

from tandem.config import BUNDLED_MODELS, ClusterConfig
from tandem.draft_checkpoint import usable_draft
from tandem.engine.decoder import best_for_draft
from tandem.engine.loading import load_engine
from tandem.engine.native.kernels import kernels_for

EIGHT_BITS = "none" if kernels_for("cpu") is None else "int8-a8"
BUDGET_BYTES = 8 << 20


def test_a_draft_model_takes_eight_bits_where_own_kernels_run_it(saved_model):
    _, llama = saved_model("llama3")
    _, gemma = saved_model("gemma2")
    assert best_for_draft(llama, "auto", "float32") == EIGHT_BITS
    assert best_for_draft(llama, "auto", "bfloat16") == "none"
    assert best_for_draft(llama, "lean", "float32") == "none"
    assert best_for_draft(gemma, "auto", "float32") == "none"


def test_a_quantized_draft_stays_as_it_is(saved_model, tmp_path):
    _, llama = saved_model("llama3")
    path = shutil.copytree(llama, tmp_path / "quantized")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (path / "config.json").write_text(json.dumps(config))
    assert best_for_draft(path, "auto", "float32") == "none"


@pytest.mark.parametrize(
    ("speculation", "kernel"),
    [
        ({"draft": "model", "draft_path": str(BUNDLED_MODELS / "draft")}, "native-int8-a8"),
        ({"draft": "self"}, "native-nf4"),
        (
            {"draft": "model", "draft_path": str(BUNDLED_MODELS / "draft"), "draft_quantization": "none"},
            "native-fp16",
        ),
    ],
)
@pytest.mark.skipif(kernels_for("cpu") is None, reason="own kernels cannot run here")
def test_only_the_draft_is_quantized(speculation, kernel):
    config = ClusterConfig.from_dict({"speculation": speculation})
    engine = load_engine(config, "decode", BUDGET_BYTES, 1, usable_draft(config))
    assert engine.draft is not None
    assert kernel in engine.draft.describe()
    assert "int8" not in engine.model.describe()
    assert "nf4" not in engine.model.describe()


def test_a_target_that_drafts_for_itself_runs_as_it_is_told_to():
    path = BUNDLED_MODELS / "draft"
    values = {
        "model": {"path": str(path), "implementation": "lean"},
        "speculation": {"draft": "model", "draft_path": str(path)},
    }
    config = ClusterConfig.from_dict(values)
    engine = load_engine(config, "decode", BUDGET_BYTES, 1, usable_draft(config))
    assert engine.draft is not None
    assert engine.draft.implementation == "lean"
