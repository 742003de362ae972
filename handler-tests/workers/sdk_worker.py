"""A worker on RunPod's own SDK, as its users write them: `python sdk_worker.py HANDLER [CONCURRENCY]`."""
import asyncio
import sys
import time

import runpod


def plain(job):
    given = job["input"]
    if given.get("raise"):
        raise ValueError("the handler raised")
    if given.get("fail"):
        return {"error": "the handler said no", "left": 1}
    return {"echo": given.get("text"), "id": job["id"]}


def generator(job):
    for number in range(job["input"]["count"]):
        yield {"number": number}
    if job["input"].get("raise"):
        raise ValueError("the generator raised")


async def async_generator(job):
    for number in range(job["input"]["count"]):
        await asyncio.sleep(job["input"].get("pause", 0))
        yield f"piece {number} é🙂"


async def slow(job):
    """Says when it began and ended, so that overlap shows."""
    began = time.time()
    await asyncio.sleep(job["input"]["seconds"])
    return {"began": began, "ended": time.time()}


async def openai_like(job):
    """What RunPod's vLLM worker does with an OpenAI call."""
    body = job["input"].get("openai_input") or {}
    if job["input"]["openai_route"] == "/v1/models":
        yield {"object": "list", "data": [{"id": "theirs/model", "object": "model", "created": 1, "owned_by": "them"}]}
        return
    if not body.get("stream"):
        message = {"role": "assistant", "content": "theirs"}
        yield {"id": "x", "object": "chat.completion", "created": 1, "model": "theirs/model", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        return
    for piece in ('{"role":"assistant","content":"the"}', '{"content":"irs"}'):
        yield 'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"theirs/model","choices":[{"index":0,"delta":%s,"finish_reason":null}]}\n\n' % piece
    yield 'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"theirs/model","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    yield "data: [DONE]\n\n"


if __name__ == "__main__":
    name = sys.argv[1]
    concurrency = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    sys.argv = sys.argv[:1]
    runpod.serverless.start(
        {"handler": globals()[name], "return_aggregate_stream": True, "concurrency_modifier": lambda current: concurrency}
    )
