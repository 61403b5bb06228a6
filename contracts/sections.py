"""What every section of a configuration is made of. Imports neither torch nor Ray."""

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

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


class ModelPool(Pool):
    """A pool whose model the vllm engine may split; each part takes the CPUs and GPUs that are given."""

    tensor_parallel: int = Field(default=1, ge=1, description="vllm: parts that each replica's model is split into")
