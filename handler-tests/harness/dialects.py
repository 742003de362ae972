"""What a client of each dialect makes of a stream: the whole answer, put together from its events, with every rule that they keep checked."""
from __future__ import annotations

import copy
import json
import math

# Log probabilities of one token, computed in other company.
NEAR = 1e-3
# Chance and the clock; what the prefix cache held at the time.
OWN = ("id", "created", "created_at", "completed_at", "arrival_time", "call_id", "signature", "item_id")


def events(text: str) -> list[dict]:
    """The JSON of a stream's frames. A name before it is its type, and only `[DONE]` is none."""
    found = []
    for frame in text.split("\n\n"):
        name, data = None, None
        for line in frame.split("\n"):
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = line.removeprefix("data: ")
            else:
                assert not line or line.startswith(":"), f"no line of an event stream: {line!r}"
        if data is not None:
            found.append("[DONE]" if data == "[DONE]" else json.loads(data))
            assert name is None or name == found[-1]["type"]
    return found


def plain(value):
    """Without what two answers to one request need not share; null is absent, and so is an empty content."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {key: plain(one) for key, one in value.items() if key not in OWN and one is not None}
    if kept.get("content") == "":
        del kept["content"]
    # A stream of no token tells of none.
    if isinstance(kept.get("logprobs"), dict) and not any(kept["logprobs"].values()):
        del kept["logprobs"]
    for key in ("prompt_tokens_details", "input_tokens_details"):
        if isinstance(kept.get(key), dict):
            kept[key].pop("cached_tokens", None)
    if "cache_read_input_tokens" in kept:
        kept["input_tokens"] += kept.pop("cache_read_input_tokens")
    return kept


def differences(left, right, path: str = "") -> list[str]:
    """Where two values differ, and how."""
    if isinstance(left, dict) and isinstance(right, dict):
        return [one for key in {**left, **right} for one in differences(left.get(key), right.get(key), f"{path}.{key}")]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return [one for place, pair in enumerate(zip(left, right)) for one in differences(*pair, f"{path}[{place}]")]
    near = isinstance(left, float) and isinstance(right, float) and math.isclose(left, right, rel_tol=NEAR, abs_tol=NEAR)
    return [] if near or left == right else [f"{path}: {left!r} is not {right!r}"]


def fold(into: dict, delta: dict) -> dict:
    """Adds a delta as OpenAI's SDKs do: texts and lists grow, entries with an index grow one by one, all else is set."""
    for key, value in delta.items():
        old = into.get(key)
        if value is None:
            into.setdefault(key, None)
        elif isinstance(value, list) and value and isinstance(value[0], dict) and "index" in value[0]:
            grown = into.setdefault(key, [])
            for part in value:
                assert part["index"] in (len(grown) - 1, len(grown)), "calls come one after another"
                if part["index"] == len(grown):
                    grown.append({})
                else:
                    assert set(part) == {"index", "function"} and set(part["function"]) == {"arguments"}, "what opens a call comes once"
                fold(grown[part["index"]], {name: one for name, one in part.items() if name != "index"})
        elif isinstance(value, dict) and isinstance(old, dict):
            fold(old, value)
        elif isinstance(value, (str, list)) and old is not None:
            into[key] = old + value
        else:
            into[key] = copy.deepcopy(value)
    return into


def chunks(found: list[dict], with_usage: bool = False) -> dict:
    """Chunks of chats and completions; `with_usage`: the last one holds counts and no choice."""
    first = found[0]
    same = ("id", "created", "model", "object")
    whole = {key: value for key, value in first.items() if key not in ("choices", "usage")}
    whole["object"] = whole["object"].removesuffix(".chunk")
    choices: dict[int, dict] = {}
    ended, roles, usage = set(), [], None
    for place, chunk in enumerate(found):
        assert "error" not in chunk, chunk
        assert [chunk[key] for key in same] == [first[key] for key in same]
        if not chunk["choices"]:
            assert place == len(found) - 1 and with_usage, "only the last chunk has no choice"
        for part in chunk["choices"]:
            index = part["index"]
            assert index not in ended, "nothing comes after a choice's end"
            if "role" in part.get("delta", {}):
                roles.append(index)
            fields = {key: value for key, value in part.items() if key not in ("index", "finish_reason", "stop_reason")}
            message = fields.pop("delta", None)
            choice = fold(choices.setdefault(index, {"index": index}), fields)
            if message is not None:
                fold(choice.setdefault("message", {}), message)
            if part["finish_reason"] is not None:
                ended.add(index)
                choice |= {"finish_reason": part["finish_reason"], "stop_reason": part.get("stop_reason")}
        usage = chunk.get("usage") or usage
    if "delta" in first["choices"][0]:
        assert roles == sorted(choices), "a role for each choice, once, in order"
    assert ended == set(choices) == set(range(len(choices))), "each choice ends"
    whole["choices"] = [choices[index] for index in sorted(choices)]
    return {**whole, "usage": usage}


def server_sent_chunks(text: str, with_usage: bool) -> dict:
    found = events(text)
    assert found.count("[DONE]") == 1 and found.pop() == "[DONE]"
    assert bool(with_usage) == (not found[-1]["choices"])
    return chunks(found, with_usage)


def pieces(found: list[dict]) -> dict:
    """The older output of native jobs."""
    texts = ["".join(text for piece in found for text in piece["choices"][choice]["tokens"]) for choice in range(len(found[0]["choices"]))]
    return {"choices": [{"tokens": [text] if text else []} for text in texts], "usage": found[-1]["usage"]}


def response(text: str) -> dict:
    """Of `/v1/responses`: the last event's response, which is what the others add up to."""
    found = events(text)
    assert "[DONE]" not in found
    assert [event["sequence_number"] for event in found] == list(range(len(found))), "numbers without gaps"
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    final = found[-1]["response"]
    assert found[-1]["type"] == f"response.{final['status']}" and found[0]["response"]["id"] == final["id"]
    items, open_item = [], None
    for event in found[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert open_item is None and event["output_index"] == len(items), "items come one after another"
            open_item = {**event["item"], "content": []} if event["item"]["type"] != "function_call" else event["item"]
            continue
        assert open_item is not None and event["output_index"] == len(items)
        if kind == "output_item.done":
            assert plain({**open_item, "status": None}) == plain({**event["item"], "status": None}), "an item is what its events said"
            items, open_item = [*items, event["item"]], None
            continue
        assert event["item_id"] == open_item["id"]
        if kind == "content_part.added":
            assert event["content_index"] == len(open_item["content"])
            open_item["content"].append(event["part"])
            continue
        if kind == "content_part.done":
            assert plain(event["part"]) == plain(open_item["content"][event["content_index"]])
            continue
        what, _, phase = kind.rpartition(".")
        if what == "function_call_arguments":
            part, name = open_item, "arguments"
        else:
            if what == "reasoning_text" and not open_item["content"]:
                open_item["content"].append({"type": "reasoning_text", "text": ""})
            part, name = open_item["content"][event["content_index"]], "text"
        if phase == "delta":
            part[name] += event["delta"]
            if event.get("logprobs"):
                part["logprobs"] = part.get("logprobs", []) + event["logprobs"]
        else:
            assert phase == "done" and part[name] == event[name]
    assert open_item is None and items == final["output"]
    return final


def message(text: str) -> dict:
    """Of `/v1/messages`."""
    found = events(text)
    assert "[DONE]" not in found and found[0]["type"] == "message_start" and found[-1]["type"] == "message_stop"
    whole, content, part = found[0]["message"], [], None
    assert whole["content"] == [] and whole["stop_reason"] is None
    for event in found[1:-1]:
        kind = event["type"]
        if kind == "content_block_start":
            assert part is None and event["index"] == len(content), "blocks come one after another"
            content.append(event["content_block"])
            part = ""
        elif kind == "content_block_delta":
            assert part is not None and event["index"] == len(content) - 1
            delta, block = event["delta"], content[-1]
            if delta["type"] == "input_json_delta":
                part += delta["partial_json"]
            else:
                name = delta["type"].removesuffix("_delta")
                block[name] += delta[name]
        elif kind == "content_block_stop":
            assert event["index"] == len(content) - 1
            if content[-1]["type"] == "tool_use":
                content[-1]["input"] = arguments(part)
            part = None
        elif kind == "message_delta":
            whole |= event["delta"] | {"usage": {**whole["usage"], **event["usage"]}}
        else:
            assert kind == "ping"
    assert part is None and found[-2]["type"] == "message_delta"
    return {**whole, "content": content}


def arguments(text: str) -> dict:
    """What a limit has cut off is no object."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
