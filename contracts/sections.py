"""What every section of a configuration is made of. Imports neither torch nor Ray."""

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

HIDDEN = "hidden:"  # of an embedder's name: the hidden states of the model after it
THINKING = ("<think>", "</think>")  # the marks around a model's reasoning, where the recipe names no others


class Section(BaseModel):
    """Base of every section: frozen, no key that nobody reads, and no number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _no_blank(self) -> "Section":
        """Text without a single character is given only where it is the default."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, str) and field.default != "" and not value.strip():
                raise PydanticCustomError("blank", "holds no text (found {text})", {"field": name, "text": repr(value)})
        return self


class Pool(Section):
    """A group of equal replicas and what each takes from the cluster."""

    replicas: int = Field(default=1, ge=1, description="actors in the pool")
    num_cpus: float = Field(default=0.2, ge=0, description="CPUs that Ray reserves for each; threads: docs/cluster.md")
    num_gpus: float = Field(default=0, ge=0, description="GPUs of each; more than 0 runs the model on CUDA")
    min_replicas: int = Field(
        default=1, ge=0, description="fewest that `tutorloop scale` may ask for; 0: none while nothing is asked of it"
    )
    max_replicas: int | None = Field(
        default=None, ge=1, description="most that `tutorloop scale` may ask for; null: as many as the cluster has"
    )
    deadline_seconds: float = Field(
        default=600, gt=0, description="a replica whose call takes longer is replaced; more where calls do take long"
    )
    max_attempts: int = Field(default=3, ge=1, description="how often a call is made before the run ends for it")
    max_restarts_per_minute: int = Field(
        default=10, ge=0, description="replicas that are replaced within a minute before the run ends for it"
    )

    @model_validator(mode="after")
    def _bounds(self) -> "Pool":
        most = self.replicas if self.max_replicas is None else self.max_replicas
        if not self.min_replicas <= self.replicas <= most:
            found = {"found": f"{self.min_replicas} ≤ {self.replicas} ≤ {most}"}
            raise PydanticCustomError("bounds", "min_replicas ≤ replicas ≤ max_replicas (found {found})", found)
        return self


class ModelPool(Pool):
    """A pool whose model the vllm engine may split; each part takes the CPUs and GPUs that are given."""

    tensor_parallel: int = Field(default=1, ge=1, description="vllm: parts that each replica's model is split into")
