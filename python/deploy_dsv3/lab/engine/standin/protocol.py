"""Request bodies with those fields of lmdeploy/serve/openai/protocol.py that the stand-in reads.

Fields it does not read are accepted as the real server accepts them: pydantic ignores what it does not know.
"""

from __future__ import annotations

import secrets
import string
from typing import Any

from pydantic import BaseModel

_ALPHABET = "".join(c for c in string.digits + string.ascii_uppercase + string.ascii_lowercase if c not in "01IOl")


def random_id() -> str:
    """22 characters as shortuuid makes them."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(22))


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class _Sampled(BaseModel):
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    ignore_eos: bool | None = False
    seed: int | None = None

    def stop_words(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def fault(self) -> str:
        """Say what is wrong with the sampling settings, in the real server's words."""
        if self.top_p is not None and not 0 < self.top_p <= 1:
            return f"The top_p {self.top_p!r} must be in (0, 1]."
        if self.top_k is not None and self.top_k < 0:
            return f"The top_k {self.top_k!r} cannot be a negative integer."
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            return f"The temperature {self.temperature!r} must be in [0, 2]"
        return ""


class ChatRequest(_Sampled):
    model: str
    messages: list[dict[str, Any]]
    n: int | None = 1
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    stream_options: StreamOptions | None = None

    def fault(self) -> str:
        if wrong := super().fault():
            return wrong
        for name in ("max_completion_tokens", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                return f"The {name} {value!r} must be a positive integer."
        return "" if self.messages else "messages must not be empty unless input_ids is set."


class CompletionRequest(_Sampled):
    model: str
    prompt: str | list[Any]
    n: int | None = 1
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    stream_options: StreamOptions | None = None

    def fault(self) -> str:
        return f"The n {self.n!r} must be a positive int." if (self.n or 0) <= 0 else super().fault()


class GenerateRequest(_Sampled):
    prompt: str | None = None
    input_ids: list[int] | None = None
    max_tokens: int = 128

    def fault(self) -> str:
        if (self.prompt is None) == (self.input_ids is None):
            return "You must specify exactly one of prompt or input_ids"
        if self.prompt == "":
            return "The prompt must not be an empty string"
        if self.input_ids == []:
            return "The input_ids must not be an empty list"
        if self.max_tokens < 0:
            return f"The max_tokens {self.max_tokens!r} must be non-negative."
        if self.max_tokens == 0:
            return f"The max_tokens {self.max_tokens!r} must be a positive integer."
        return super().fault()


class AbortRequest(BaseModel):
    abort_all: bool = False
    session_id: int | None = -1


def usage(prompt: int, completion: int, *, cached: bool) -> dict[str, Any]:
    """The usage of a finished request; chat reports cached tokens, completions do not."""
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": 0} if cached else None,
        "completion_tokens_details": None,
    }


def model_list(name: str, created: int) -> dict[str, Any]:
    """The body of /v1/models."""
    permission = {
        "id": f"modelperm-{random_id()}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": True,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    card = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "lmdeploy",
        "root": name,
        "parent": None,
        "permission": [permission],
    }
    return {"object": "list", "data": [card]}
