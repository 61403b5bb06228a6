"""The sections of the verifier service: the verifier, its rewards, the skill bank. Imports neither torch nor Ray."""

from typing import Literal

from pydantic import Field, model_validator

from .sections import Pool, Section

KINDS = ("math", "exact", "numeric", "reasoning_gym", "http", "none")  # or a function of one's own


class Reward(Section):
    """A part of the reward beside the verifier's own score; it never decides whether a response passed."""

    kind: str = Field(description="format, length, or a reward function of one's own as in verifier.kind")
    weight: float = Field(description="its score is multiplied by this and added; a penalty has a negative one")
    pattern: str = Field(
        default="",
        description="format: 1 where this regular expression (. is newlines too) matches the whole response; none: "
        "where it holds one complete box",
    )
    limit: int = Field(default=0, ge=0, description="length: most tokens; from `limit` on its score is -1")
    buffer: int = Field(default=0, ge=0, description="length: it falls from 0 to -1 over the last so many tokens")

    @model_validator(mode="after")
    def _of_its_kind(self) -> "Reward":
        if self.pattern and self.kind != "format":
            raise ValueError("verifier.rewards: pattern is for kind: format")
        if bool(self.limit) != (self.kind == "length"):
            raise ValueError("verifier.rewards: limit is given where kind is length, and only there")
        if self.buffer > self.limit:
            raise ValueError("verifier.rewards: buffer is at most limit")
        return self


class Verifier(Pool):
    """The verifier pool."""

    num_cpus: float = Field(default=0.1, ge=0, description="CPUs of each replica; as many processes judge, at least 2")
    kind: str = Field(
        default="math",
        description="math, exact, numeric, reasoning_gym, http or none; or a reward function of one's own with TRL's "
        "signature: MODULE:FUNCTION or FILE.py:FUNCTION",
    )
    answers: Literal["box", "any"] = Field(
        default="box",
        description="where the answer is read: the last box, or without any box wherever one stands",
    )
    marker: str = Field(default="", description="in place of a box, the answer is what follows this on its last line")
    tolerance: float = Field(default=0.0, ge=0, description="numeric: largest difference, as a share of the gold")
    pass_score: float = Field(
        default=1.0, description="reasoning_gym, functions, http without `passed`: score from which a response passed"
    )
    urls: tuple[str, ...] = Field(default=(), description="http: servers that judge, tried in turn")
    api_key_env: str = Field(default="", description="http: environment variable that holds the servers' key")
    timeout_seconds: float = Field(
        default=5.0,
        gt=0,
        description="budget of a sample: seconds of CPU time, ten times as long in all (http: seconds in all)",
    )
    memory_gib: float = Field(default=1.0, gt=0, description="budget of a sample's memory")
    response_fault: Literal["incorrect", "abstain"] = Field(
        default="incorrect",
        description="what a response is that cannot be judged by its own fault: too large, over its budget",
    )
    weight: float = Field(default=1.0, description="of the verifier's own score in the reward")
    rewards: tuple[Reward, ...] = Field(default=(), description="what else the reward is made of: kind, weight, …")

    @property
    def reads_rows(self) -> bool:
        """Whether it is shown the dataset's whole rows."""
        kinds = [self.kind, *(reward.kind for reward in self.rewards)]
        return any(kind in ("reasoning_gym", "http") or ":" in kind for kind in kinds)

    @property
    def needs_gold(self) -> bool:
        """Whether every row needs a gold answer."""
        return self.kind in ("math", "exact", "numeric")

    @model_validator(mode="after")
    def _of_its_kind(self) -> "Verifier":
        if self.kind not in KINDS and ":" not in self.kind:
            raise ValueError(f"verifier.kind is one of {', '.join(KINDS)}, MODULE:FUNCTION or FILE.py:FUNCTION")
        for reward in self.rewards:
            if reward.kind not in ("format", "length") and ":" not in reward.kind:
                raise ValueError("verifier.rewards: kind is format, length, MODULE:FUNCTION or FILE.py:FUNCTION")
        if (self.kind == "http") != bool(self.urls):
            raise ValueError("verifier.urls are given where verifier.kind is http, and only there")
        if self.api_key_env and self.kind != "http":
            raise ValueError("verifier.api_key_env is for verifier.kind=http")
        if self.tolerance and self.kind != "numeric":
            raise ValueError("verifier.tolerance is for verifier.kind=numeric")
        if self.rewards and self.kind == "none":
            raise ValueError("verifier.rewards are for a verifier: verifier.kind is none")
        return self


class Skills(Pool):
    """The skill bank, for methods whose teachers are shown its skills and mistakes.

    A run works on a copy in its own folder, at a version of its own; the bank at `path` stays as it is.
    """

    num_cpus: float = Field(default=0.1, ge=0, description="CPUs of each replica")
    path: str = Field(description="a bank's folder or object store path, a published JSON file, or `lab:bank`")
    embedder: str = Field(
        default="lexical", description="lexical (no download), or a sentence-transformers model (extra `embeddings`)"
    )
    update_every: int = Field(default=0, ge=0, description="steps between two updates of the bank; 0: none")
    update_below: float = Field(
        default=0.8, gt=0, le=1, description="the bank is updated where fewer of the last rollouts passed"
    )
    most_new: int = Field(default=5, ge=1, description="entries that an update adds at most, of skills and of mistakes")
    capacity: int = Field(default=30, ge=1, description="entries that updates add at most over a run, of either kind")
    extractor: str = Field(
        default="lab", description="lab (from worked steps, no model), or an OpenAI-compatible server http://HOST/v1"
    )
    extractor_model: str = Field(default="", description="the model's name at the server")
    api_key_env: str = Field(default="", description="environment variable that holds the server's key")

    @model_validator(mode="after")
    def _of_its_extractor(self) -> "Skills":
        if self.extractor != "lab" and not self.extractor.startswith(("http://", "https://")):
            raise ValueError("skills.extractor is lab, or a server's address such as http://HOST:8000/v1")
        if (self.extractor == "lab") == bool(self.extractor_model):
            raise ValueError("skills.extractor_model is given where skills.extractor is a server, and only there")
        return self


class Strategies(Pool):
    """The strategy service, for methods that reward how a problem was solved (docs/strategies.md)."""

    num_cpus: float = Field(default=0.1, ge=0, description="CPUs of each replica")
    path: str = Field(description="a folder that `tutorloop strategies fit` made: the extractor and its solutions")
