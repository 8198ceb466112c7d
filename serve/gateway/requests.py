"""What a request may say: every field that is let through, and its bounds. What is not here is refused before anything sees it.

The engine would take much more (chat templates, regular expressions, media URLs, thousands of choices): each of those can hang it,
empty its memory, or make it read addresses for a stranger.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_CHOICES = 4
MAX_MESSAGES = 512
MAX_TOOLS = 64
MAX_TEXTS = 256  # of one embeddings request
MAX_REPEATS = 1000  # in a JSON schema: a grammar grows with them
MAX_SCHEMA_NODES = 2000
REGULAR_EXPRESSIONS = ("pattern", "patternProperties")
BOUNDED_IN_SCHEMAS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")

Name = Annotated[str, Field(min_length=1, max_length=256)]
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]  # the engine itself refuses those beyond its vocabulary
TokenCount = Annotated[int, Field(ge=1, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """Unknown fields are refused, and numbers that are none."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(Strict):
    """A piece of text; images, audio and files are refused."""

    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    """What a model asked a tool."""

    name: ToolName
    arguments: str


class ToolCall(Strict):
    """A tool call of an earlier turn."""

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: Name | None = None
    refusal: None = None  # as the SDKs hand back an answer

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])


class FunctionDefinition(Strict):
    """A tool a model may call."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _is_harmless(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        return schema if schema is None else harmless_schema(schema)


class Tool(Strict):
    """A tool."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """The one tool that must be called."""

    name: ToolName


class NamedTool(Strict):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """A schema the answer must meet."""

    name: ToolName
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def _is_harmless(cls, schema: dict[str, Any]) -> dict[str, Any]:
        return harmless_schema(schema)


class ResponseFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool | None = None


class Sampling(Strict):
    """What chat and plain completions share."""

    model: Name
    max_tokens: TokenCount | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256, description="taken and not passed on, like the five after it")
    metadata: dict[str, str] | None = Field(None, max_length=16)
    store: bool | None = None
    service_tier: str | None = Field(None, max_length=64)
    safety_identifier: str | None = Field(None, max_length=256)
    prompt_cache_key: str | None = Field(None, max_length=256)

    def forwarded(self, served_name: str) -> dict[str, Any]:
        """What goes to a model's server: the fields that the client set, under the name that the server knows."""
        return self.model_dump(exclude_unset=True, exclude_none=True, by_alias=True, exclude=NOT_FORWARDED) | {"model": served_name}


NOT_FORWARDED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None

    def forwarded(self, served_name: str) -> dict[str, Any]:
        """See Sampling; open models know no role `developer`, and call it system."""
        body = super().forwarded(served_name)
        for message in body["messages"]:
            if message["role"] == "developer":
                message["role"] = "system"
        return body


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(max_length=MAX_CHOICES)] | list[TokenId]
    logprobs: int | None = Field(None, ge=0, le=20)


class EmbeddingRequest(Strict):
    """POST /v1/embeddings."""

    model: Name
    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=256)


class FeedbackRequest(Strict):
    """POST /v1/feedback: what a person says the right answer is; `answer` null: the documents do not answer it."""

    trace_id: str = Field(pattern=r"^[0-9a-f]{32}$", description="of the answer, from its `understudy` field")
    answer: str | None = Field(max_length=20_000)
    quotes: list[Annotated[str, Field(min_length=1, max_length=2000)]] = Field(
        default_factory=list, max_length=8, description="verbatim; without any, the sentence that supports the answer best is looked for"
    )


class InputMessage(Strict):
    """A turn of a response's input."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class InputText(Strict):
    """A piece of text, or of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: str


class ResponseRequest(Strict):
    """POST /v1/responses: text in, text out; nothing is stored, so there is no `previous_response_id`."""

    model: Name
    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: TokenCount | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    user: str | None = Field(None, max_length=256)

    def as_chat(self) -> ChatRequest:
        """The same as a chat completion."""
        turns = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            turns.append({"role": "user", "content": self.input})
        else:
            turns += [{"role": message.role, "content": message.text} for message in self.input]
        settings = {"temperature": self.temperature, "top_p": self.top_p, "max_completion_tokens": self.max_output_tokens, "stream": self.stream}
        return ChatRequest.model_validate({"model": self.model, "messages": turns, **{k: v for k, v in settings.items() if v is not None}})


def harmless_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema; raises ValueError where the grammar made of it could be endless, or a reference leads outside."""
    left: list[Any] = [schema]
    nodes = 0
    while left:
        node = left.pop()
        nodes += 1
        if nodes > MAX_SCHEMA_NODES:
            raise ValueError(f"a schema of more than {MAX_SCHEMA_NODES} parts")
        if isinstance(node, list):
            left += [each for each in node if isinstance(each, dict | list)]
        if not isinstance(node, dict):
            continue
        for key, value in node.items():
            if key in REGULAR_EXPRESSIONS and (isinstance(value, str) or key == "patternProperties"):  # a property may be called pattern
                raise ValueError(f"`{key}` is not allowed in a schema")
            if key in BOUNDED_IN_SCHEMAS and isinstance(value, int | float) and value > MAX_REPEATS:
                raise ValueError(f"`{key}` of more than {MAX_REPEATS} in a schema")
            if key == "$ref" and isinstance(value, str) and not value.startswith("#"):
                raise ValueError("`$ref` leads outside the schema")
            if isinstance(value, dict | list):
                left.append(value)
    return schema
