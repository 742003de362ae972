"""What every client asks the demo model, and what it must get."""
from __future__ import annotations

from typing import Annotated, Literal

from pydantic import UUID4, BaseModel, ConfigDict, Field

CAPITAL, CAPITAL_ANSWER = "What is the capital of France?", "Paris."
WEATHER, WEATHER_ANSWER = "What is the weather in Paris?", "It is sunny there."
JSON = "Give me a JSON object with a name and an age."
TOO_LONG = "word " * 5000


class Person(BaseModel):
    """A person."""

    name: str
    age: int


class Closed(BaseModel):
    # The tiny model would name properties without end where others than these are allowed.
    model_config = ConfigDict(extra="forbid")


class Cat(Closed):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(Closed):
    kind: Literal["dog"]
    good: bool


class Review(Closed):
    """A schema with what pydantic writes into one: titles, defaults, references, formats, limits, unions, enumerations."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"verdict": "good"}]})

    verdict: Literal["good", "bad"] = Field(description="What to think of it")
    stars: int = Field(ge=1, le=5, examples=[3])
    tags: list[Literal["a", "b", "c"]] = Field(default_factory=list, max_length=2)
    code: str = Field(pattern=r"^[A-Z]{2}-\d{2}$")
    id: UUID4 | None = None
    place: Annotated[str, Field(max_length=8, json_schema_extra={"format": "path"})] | None = None
    counts: dict[Literal["x", "y"], Literal[0, 1]] = Field(default_factory=dict)
    pet: Cat | Dog = Field(discriminator="kind")
    note: Literal["none", "some"] | None = None
    author: Dog | None = Field(default=None, deprecated=False)


class Calls(list):
    """A tool's calls, in the order in which they came."""

    def get_weather(self, city: str) -> str:
        self.append(city)
        return '{"weather": "sunny"}'
