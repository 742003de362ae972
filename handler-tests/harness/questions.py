"""The demo model's questions and their answers, word for word at temperature 0."""
from __future__ import annotations

import json
from dataclasses import dataclass, field

from .program import REPOSITORY

FILE = REPOSITORY / "handler-tests/fixtures/demo-model/questions.json"


@dataclass(frozen=True)
class Question:
    name: str
    answer: str
    body: dict = field(hash=False)

    @property
    def is_chat(self) -> bool:
        return "messages" in self.body

    @property
    def route(self) -> str:
        return "/chat/completions" if self.is_chat else "/completions"

    def request(self, **more) -> dict:
        """An OpenAI body, or the `input` of a job. The greedy answer, as long as it is."""
        limit = {} if self.is_chat else {"max_tokens": 300}
        return {**self.body, "temperature": 0, **limit, **more}


def joined(message: dict) -> str:
    """What the model wrote, put together again from its thoughts, its content and its tool calls."""
    calls = [
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": {call["function"]["arguments"]}}}\n</tool_call>'
        for call in message.get("tool_calls") or []
    ]
    parts = [message.get("content") or "", *calls]
    text = "\n".join(part for part in parts if part)
    thoughts = message.get("reasoning_content")
    assert message.get("reasoning") == thoughts
    return text if thoughts is None else f"<think>\n{thoughts}\n</think>\n\n{text}"


def gathered(chunks: list[dict], index: int = 0) -> dict:
    """The message that the deltas of a choice add up to."""
    message: dict = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            for key, value in choice["delta"].items():
                if key != "tool_calls":
                    message[key] = (message.get(key) or "") + (value or "")
                    continue
                calls = message.setdefault("tool_calls", [])
                for part in value:
                    if part["index"] == len(calls):
                        calls.append({"id": part["id"], "type": part["type"], "function": {"name": part["function"]["name"], "arguments": ""}})
                    else:
                        assert set(part) == {"index", "function"} and set(part["function"]) == {"arguments"}
                    calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return message


def text(answer: dict) -> str:
    """The text of a whole answer of either route, as the model wrote it."""
    choice = answer["choices"][0]
    return joined(choice["message"]) if "message" in choice else choice["text"]


def stream_text(chunks: list[dict]) -> str:
    """The same of a stream's chunks."""
    is_chat = any("delta" in choice for chunk in chunks for choice in chunk["choices"])
    return joined(gathered(chunks)) if is_chat else "".join(delta(chunk) for chunk in chunks)


def delta(chunk: dict, index: int = 0) -> str:
    """The content that a chunk of either route adds to a choice."""
    parts = []
    for choice in chunk["choices"]:
        if choice["index"] == index:
            parts.append((choice["delta"].get("content") if "delta" in choice else choice["text"]) or "")
    return "".join(parts)


def load() -> list[Question]:
    asked = json.loads(FILE.read_text(encoding="utf-8"))
    asked = asked["questions"] if isinstance(asked, dict) else asked
    fields = ("messages", "prompt", "tools", "chat_template_kwargs")
    return [Question(one["name"], one["answer"], {key: one[key] for key in fields if key in one}) for one in asked]


# Tools are a feature of their own: here the questions that need none.
ALL = [question for question in load() if "tools" not in question.body] if FILE.exists() else []
WITH_TOOLS = [question for question in load() if "tools" in question.body] if FILE.exists() else []
BY_NAME = {question.name: question for question in ALL}
