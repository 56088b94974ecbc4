"""What a client may send. Pydantic models of the request bodies, and nothing else.

Invariants:
- an unknown field is an error; no field is accepted and ignored, save `TOLERATED`;
- types are strict (`"1"` is no number, `true` is no integer, NaN is nothing), null means the default;
- ranges that need no knowledge of the model are checked here, all others in `params`.

`TOLERATED` are OpenAI's bookkeeping fields: they name the caller and have no effect on the answer, there or here.
"""

from server.openai.schema.body import Body
from server.openai.schema.chat import ChatRequest, Message
from server.openai.schema.common import (
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOPS,
    MAX_TREE_NODES,
    TOLERATED,
    GenerationRequest,
    RequestBody,
    SpeculationOptions,
    StreamOptions,
)
from server.openai.schema.completion import CompletionRequest

__all__ = [
    "MAX_BAD_WORDS",
    "MAX_CHOICES",
    "MAX_LOGPROBS",
    "MAX_STOPS",
    "MAX_TREE_NODES",
    "TOLERATED",
    "Body",
    "ChatRequest",
    "CompletionRequest",
    "GenerationRequest",
    "Message",
    "RequestBody",
    "SpeculationOptions",
    "StreamOptions",
]
