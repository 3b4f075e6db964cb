"""A service that computes nothing: tokens come by the clock. Over gRPC, and over HTTP on the next port.

python -m tests.bench.serve.null_server NUM_TOKENS GAP_S
"""

from __future__ import annotations

import asyncio
import json
import sys

from tandem import rpc
from tandem.pb.v1 import generation_pb2 as pb
from tandem.pb.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc

NUM_TOKENS, GAP_S = int(sys.argv[1]), float(sys.argv[2])


class Generation(generation_pb2_grpc.GenerationServiceServicer):
    async def StreamGenerate(self, request, context):
        for position in range(NUM_TOKENS):
            chunk = pb.TokenChunk(position=position, token_ids=[7], text="x")
            yield pb.StreamGenerateResponse(token_chunk=chunk)
            await asyncio.sleep(GAP_S)
        usage = pb.Usage(prompt=3, completion=NUM_TOKENS, drafted=10, accepted=4)
        timings = pb.Timings(queue_ms=1, prefill_ms=2, decode_ms=1e3 * GAP_S * NUM_TOKENS)
        yield pb.StreamGenerateResponse(finished=pb.Finished(usage=usage, timings=timings))


class Models(model_pb2_grpc.ModelServiceServicer):
    async def ListModels(self, request, context):
        return model_pb2.ListModelsResponse(
            models=[model_pb2.Model(name="null", max_context=2048, vocab_size=1000)]
        )


async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"length" in line)
    asked = json.loads(await reader.readexactly(length))
    if asked["model"] != "null":
        content = json.dumps({"error": {"message": "no", "code": "NO_SUCH_MODEL"}}).encode()
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        writer.close()
        return
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")

    def event(text: str) -> None:
        data = f"data: {text}\n\n".encode()
        writer.write(b"%x\r\n" % len(data) + data + b"\r\n")

    for _ in range(NUM_TOKENS):
        event(json.dumps({"choices": [{"index": 0, "text": "x"}]}))
        await asyncio.sleep(GAP_S)
    event(json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": NUM_TOKENS}}))
    event("[DONE]")
    writer.write(b"0\r\n\r\n")
    writer.close()


async def main() -> None:
    server = rpc.server(public=False)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(Generation(), server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(Models(), server)
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    listening = await asyncio.start_server(http, "127.0.0.1", 0, backlog=1024)
    print(port, listening.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
