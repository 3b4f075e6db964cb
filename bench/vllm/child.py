"""Runs vLLM in a Python of its own, where it is installed; imports nothing of ours.

    python child.py SETTINGS

SETTINGS is JSON: `{"model": folder, "dtype": "float32", "max_sequences": n, "max_tokens": n}`, the last of a
prompt with its output; threads and KV memory are in the environment. Each line of standard input is a JSON
request `{"prompts": [[ids]], "max_tokens": n}`: all prompts are completed greedily at once, and
`{"seconds": s, "outputs": [[ids]]}` is the answer. The model is loaded before the first one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def serve(settings: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints is no answer
    import vllm

    engine = _engine(vllm, settings)
    for line in sys.stdin:
        print(json.dumps(_complete(vllm, engine, json.loads(line))), file=answers, flush=True)


def _engine(vllm: Any, settings: dict[str, Any]) -> Any:
    return vllm.LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        skip_tokenizer_init=True,
        max_model_len=settings["max_tokens"],
        max_num_seqs=settings["max_sequences"],
        enable_prefix_caching=False,  # the same prompts come again and again
        seed=0,
    )


def _complete(vllm: Any, engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    count = request["max_tokens"]
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    began_s = time.perf_counter()
    results = engine.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began_s
    return {"seconds": seconds, "outputs": [list(result.outputs[0].token_ids) for result in results]}


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
