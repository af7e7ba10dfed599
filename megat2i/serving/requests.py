"""What a request may say, and the errors that answer one, in the shape of OpenAI's interface."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from megat2i.config import ConfigError, SamplingConfig
from megat2i.generate import Sampler

MAX_PROMPT = 1000  # characters
MAX_IMAGES = 10  # of one request, as OpenAI's
MAX_SEED = 2**32 - 1
RANDOM_SEEDS = 1_000_000  # short enough to be read and typed again


class ApiError(Exception):
    """A request that is refused or failed. ``param``: the parameter that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


class ImageRequest(BaseModel):
    """Parameters of OpenAI's ``images.generate`` and this model's own. What would change the image and cannot be had is
    refused; ``model`` and ``user`` are read and do not matter."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(max_length=MAX_PROMPT)
    n: int | None = Field(None, ge=1, le=MAX_IMAGES)
    size: str | None = Field(None, max_length=20)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)  # of the first image; the next ones count on
    response_format: Literal["b64_json"] | None = None
    temperature: float | None = None
    top_k: int | None = None
    guidance: float | None = None
    model: str | None = Field(None, max_length=200)
    user: str | None = Field(None, max_length=200)
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png"] | None = None
    stream: Literal[False] | None = None


@dataclass(frozen=True)
class ServedRun:
    """The run that is served. ``sampling``: its settings where a request says nothing; ``guidance``: whether it was
    trained on empty captions too, which guidance compares with."""

    name: str
    sampler: Sampler
    sampling: SamplingConfig
    guidance: bool

    @property
    def size(self) -> str:
        side = self.sampler.image_tokenizer.image_size
        return f"{side}x{side}"

    def sampling_for(self, wanted: ImageRequest) -> SamplingConfig:
        """The settings that ``wanted`` asks for; raises ApiError."""
        if wanted.size not in (None, "auto", self.size):
            problem = f"size: this model draws {self.size} pixels; leave size out or write '{self.size}'"
            raise ApiError(400, problem, "size", "invalid_size")
        given = {name: getattr(wanted, name) for name in ("temperature", "top_k", "guidance")}
        sampling = replace(self.sampling, **{name: value for name, value in given.items() if value is not None})
        try:
            sampling.check()
        except ConfigError as error:
            message = str(error).removeprefix("sampling.")
            raise ApiError(400, message, message.split(" ")[0], "invalid_value") from error
        if sampling.top_k >= self.sampler.vocab.image_codes:
            sampling = replace(sampling, top_k=0)  # the same draw, so it shares a batch with others
        if sampling.guidance != 1 and not self.guidance:
            problem = "guidance: this model was trained with data.caption_dropout=0, so guidance must be 1"
            raise ApiError(400, problem, "guidance", "invalid_value")
        return sampling

    def prompt_tokens(self, prompt: str) -> list[int]:
        """Raises ApiError where the model reads no prompts."""
        try:
            return self.sampler.prompt_tokens(prompt)
        except ConfigError as error:
            raise ApiError(400, f"prompt: {error}", "prompt", "invalid_value") from error


def seeds_for(wanted: ImageRequest) -> list[int]:
    """One for every image; a request without a seed gets a random one. Raises ApiError."""
    count = wanted.n or 1
    first = secrets.randbelow(RANDOM_SEEDS) if wanted.seed is None else wanted.seed
    if first + count - 1 > MAX_SEED:
        raise ApiError(400, f"seed: the last image's seed would be above {MAX_SEED}", "seed", "invalid_value")
    return list(range(first, first + count))
