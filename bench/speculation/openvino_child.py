"""Runs OpenVINO GenAI in a Python of its own, where it is installed; imports nothing of ours.

    python openvino_child.py export CHECKPOINT FOLDER
    python openvino_child.py serve TARGET DRAFT THREADS

`serve` reads one JSON request per line, `{"prompts": [[ids]], "max_tokens": n, "k": k or 0}`, completes the
prompts one after the other, greedily, and answers `{"seconds": s, "outputs": [[ids]]}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

CACHE_GB = 1


def export(checkpoint: str, folder: str) -> None:
    """The checkpoint as OpenVINO's model and tokenizer; weights keep the precision of the file."""
    from optimum.exporters.openvino import main_export

    main_export(
        checkpoint,
        folder,
        task="text-generation-with-past",
        library_name="transformers",
        convert_tokenizer=True,  # the pipeline loads no model without one
    )


def serve(target: str, draft: str, threads: int) -> None:
    """Both pipelines are loaded; k = 0 asks for the plain one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints is no answer
    import openvino_genai as genai

    options = {"INFERENCE_NUM_THREADS": threads}
    plain = genai.LLMPipeline(target, "CPU", **options)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    drafting = genai.draft_model(draft, "CPU", **options)
    speculative = genai.LLMPipeline(
        target, "CPU", draft_model=drafting, scheduler_config=scheduler, **options
    )
    for line in sys.stdin:
        request = json.loads(line)
        answer = _complete(genai, speculative if request["k"] else plain, request)
        print(json.dumps(answer), file=answers, flush=True)


def _complete(genai: Any, pipeline: Any, request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import openvino as ov

    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = request["max_tokens"]
    config.ignore_eos = True
    if request["k"]:
        config.num_assistant_tokens = request["k"]
    outputs = []
    began_s = time.perf_counter()
    for prompt in request["prompts"]:
        ids = np.array([prompt], dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        outputs.append([int(token) for token in pipeline.generate(inputs, config).tokens[0]])
    return {"seconds": time.perf_counter() - began_s, "outputs": outputs}


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "export":
        export(*arguments)
    else:
        serve(arguments[0], arguments[1], int(arguments[2]))
