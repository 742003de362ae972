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


def text(answer: dict) -> str:
    """The text of a whole answer of either route."""
    choice = answer["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def delta(chunk: dict, index: int = 0) -> str:
    """The text that a chunk of either route adds to a choice."""
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
