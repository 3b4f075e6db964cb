"""Runs OpenVINO GenAI in a Python of its own, where it is installed; imports nothing of ours.

    python child.py export CHECKPOINT FOLDER BITS
    python child.py serve SETTINGS

SETTINGS is JSON: `{"threads": n, "pipelines": {name: {"target": folder, "draft": folder or null,
"cache_gb": n}}}`; with a cache the pipeline batches continuously, without one it is the simple kind. `serve`
reads one JSON request per line, `{"pipeline": name, "prompts": [[ids]], "max_tokens": n, "k": k or 0,
"together": bool}`, completes the prompts greedily, one after the other or all at once, and answers
`{"seconds": s, "outputs": [[ids]]}`. A pipeline is loaded when it is first asked for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

INT4_GROUP = 64


def export(checkpoint: str, folder: str, bits: int) -> None:
    """The checkpoint as OpenVINO's model and tokenizer; weights keep the precision of the file at 16 bits."""
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig, OVWeightQuantizationConfig

    options: dict[str, Any] = {}
    if bits == 4:
        options = {"bits": 4, "sym": True, "group_size": INT4_GROUP, "ratio": 1.0}
    elif bits == 8:
        options = {"bits": 8, "sym": True}
    main_export(
        checkpoint,
        folder,
        task="text-generation-with-past",
        library_name="transformers",
        convert_tokenizer=True,  # the pipeline loads no model without one
        ov_config=OVConfig(quantization_config=OVWeightQuantizationConfig(**options)) if options else None,
    )


def serve(settings: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints is no answer
    import openvino_genai as genai

    pipelines: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["pipeline"]
        if name not in pipelines:
            pipelines[name] = _pipeline(genai, settings["pipelines"][name], settings["threads"])
        answer = _complete(genai, pipelines[name], request)
        print(json.dumps(answer), file=answers, flush=True)


def _pipeline(genai: Any, wanted: dict[str, Any], threads: int) -> Any:
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if wanted["draft"]:
        options["draft_model"] = genai.draft_model(wanted["draft"], "CPU", INFERENCE_NUM_THREADS=threads)
    if wanted["cache_gb"]:
        options["scheduler_config"] = genai.SchedulerConfig()
        options["scheduler_config"].cache_size = wanted["cache_gb"]
        options["scheduler_config"].enable_prefix_caching = False  # the same prompts come again and again
    return genai.LLMPipeline(wanted["target"], "CPU", **options)


def _complete(genai: Any, pipeline: Any, request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import openvino as ov

    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = request["max_tokens"]
    config.ignore_eos = True
    if request["k"]:
        config.num_assistant_tokens = request["k"]
    prompts = request["prompts"]
    calls = [prompts] if request["together"] else [[prompt] for prompt in prompts]
    outputs: list[list[int]] = []
    began_s = time.perf_counter()
    for call in calls:
        ids = np.array(call, dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        results = pipeline.generate(inputs, config).tokens
        outputs += [[int(token) for token in tokens] for tokens in results]
    return {"seconds": time.perf_counter() - began_s, "outputs": outputs}


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "export":
        export(arguments[0], arguments[1], int(arguments[2]))
    else:
        serve(json.loads(arguments[0]))
