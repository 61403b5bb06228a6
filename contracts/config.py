"""The sections of a run's configuration, which recipe.py reads and validates. Imports neither torch nor Ray."""

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from .data_config import Data, Eval, Replay
from .engines import ROLLOUT_ENGINES, TEACHER_ENGINES, RolloutCapabilities, TeacherCapabilities
from .reliability import Autoscale, Guards, Notify
from .sections import THINKING, ModelPool, Pool, Section
from .verifier_config import Skills, Strategies, Verifier

KEPT_SCORES = "of the run folder's disk, for scores that may be asked for again (docs/reliability.md); 0: none kept"


class Lora(Section):
    """Low-rank adapters (peft) on the student: only they are trained, published and saved."""

    rank: int = Field(default=32, ge=1, description="of the update of each matrix")
    alpha: float = Field(default=64.0, gt=0, description="the update is scaled by alpha / rank")
    targets: tuple[str, ...] | Literal["all-linear"] = Field(
        default="all-linear", description="names of the matrices that get one; all-linear is every one but the head"
    )


class Student(Section):
    """The model to train."""

    model: str = Field(description="local folder, hub id, or `lab:student`")
    lora: Lora | None = Field(default=None, description="train adapters instead of the weights: rank, alpha, targets")


class Teacher(ModelPool):
    """A teacher pool."""

    model: str = Field(
        description="local folder, hub id, or `lab:teacher`; shares the student's tokenizer. http: its name there"
    )
    engine: str = Field(
        default="transformers",
        description=f"what runs the model: {TEACHER_ENGINES.choices}; http: servers at `urls`, that somebody else runs",
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        description="vllm: parts a replica's model is split into; num_cpus and num_gpus are a part's",
    )
    urls: tuple[str, ...] = Field(
        default=(), description="http: OpenAI-compatible servers of that one model, e.g. http://HOST:8000/v1"
    )
    requests_per_url: int = Field(default=16, ge=1, description="http: most requests at one server at a time")
    timeout_seconds: float = Field(default=120.0, gt=0, description="http: deadline of a rollout, retries included")
    api_key_env: str = Field(default="", description="http: environment variable that holds the servers' key")
    signal: Literal["sampled", "topk", "exact"] = Field(default="exact", description="what it returns for each token")
    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="of its weights")
    tokens_per_batch: int = Field(default=8192, ge=1, description="most tokens in one forward pass")
    follows: Literal["", "live", "ema"] = Field(
        default="", description="a self-teacher takes the student's published weights: as they are, or their average"
    )
    ema_decay: float = Field(default=0.95, ge=0, lt=1, description="of `ema`: share of the old average kept a version")
    shared: bool = Field(
        default=False, description="a `live` self-teacher without a pool of its own: the rollout replicas score too"
    )
    weight: float = Field(default=1.0, gt=0, description="of its loss, where several teachers score one rollout")
    cache_gib: float = Field(default=1.0, ge=0, description=KEPT_SCORES)

    @model_validator(mode="after")
    def _of_its_engine(self) -> "Teacher":
        fault = TEACHER_ENGINES.fault(self.engine)
        if self.engine in TEACHER_ENGINES.names:  # one's own: cluster/methods/checks.py
            fault = self.beyond()
        if fault:
            raise ValueError(fault)
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
                raise ValueError("teacher.urls read http://HOST:PORT/v1, without a key (teacher.api_key_env)")
        if self.shared and self.follows != "live":
            raise ValueError("teacher.shared is for teacher.follows=live: rollout replicas hold the student's weights")
        return self

    def beyond(self) -> str:
        """What is asked here that the engine cannot do; "" where it can do all. Raises ConfigError."""
        can, engines = self.capabilities, TEACHER_ENGINES
        if can.remote != self.remote:
            return f"teacher.urls are given where teacher.engine is {engines.that('remote')}, and only there"
        if self.api_key_env and not can.remote:
            return f"teacher.api_key_env is for teacher.engine={engines.that('remote')}"
        if self.tensor_parallel > 1 and not can.split:
            return f"teacher.tensor_parallel is for teacher.engine={engines.that('split')}"
        if self.follows and not can.takes_weights:
            return f"teacher.follows needs weights of our own: teacher.engine={engines.that('takes_weights')}"
        if self.follows == "ema" and not can.averages:
            return f"teacher.follows=ema averages the weights here: teacher.engine={engines.that('averages')}"
        return ""

    @property
    def remote(self) -> bool:
        """Whether servers run its model, and nothing here does."""
        return bool(self.urls)

    @property
    def capabilities(self) -> TeacherCapabilities:
        """Of its engine; one's own is loaded for it. Raises ConfigError."""
        return TEACHER_ENGINES.capabilities(self.engine)


class Reference(Pool):
    """A frozen model beside the teacher, asked for sampled tokens: the student as it began, or the teacher's base."""

    model: str = Field(description="local folder or hub id; shares the student's tokenizer")
    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="of its weights")
    tokens_per_batch: int = Field(default=8192, ge=1, description="most tokens in one forward pass")
    cache_gib: float = Field(default=1.0, ge=0, description=KEPT_SCORES)


class Rollout(ModelPool):
    """The rollout pool and how it samples. Its weights have the learner's dtype."""

    engine: str = Field(
        default="transformers",
        description=f"what runs the model: {ROLLOUT_ENGINES.choices}",
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        description="vllm: parts a replica's model is split into; num_cpus and num_gpus are a part's",
    )
    in_flight: Literal["keep", "abort", "wait"] = Field(
        default="keep",
        description="vllm: new weights let running rollouts go on, start them again, or wait for their end",
    )
    transfer: Literal["object_store", "broadcast"] = Field(
        default="object_store",
        description="vllm: new weights come by the object store, or by a broadcast from the learner (NCCL on GPUs)",
    )
    samples_per_prompt: int = Field(default=4, ge=1, description="rollouts in a prompt group")
    max_new_tokens: int = Field(default=256, ge=1, description="longest response; prompt and response fit the context")
    temperature: float = Field(default=1.0, ge=0, description="0 is greedy")
    batch_size: int = Field(default=64, ge=1, description="most rollouts that a replica samples at once")

    @model_validator(mode="after")
    def _of_its_engine(self) -> "Rollout":
        fault = ROLLOUT_ENGINES.fault(self.engine)
        if self.engine in ROLLOUT_ENGINES.names:  # one's own: cluster/methods/checks.py
            fault = self.beyond()
        if fault:
            raise ValueError(fault)
        return self

    def beyond(self) -> str:
        """What is asked here that the engine cannot do; "" where it can do all. Raises ConfigError."""
        can, engines = self.capabilities, ROLLOUT_ENGINES
        if self.tensor_parallel > 1 and not can.split:
            return f"rollout.tensor_parallel is for rollout.engine={engines.that('split')}"
        if self.in_flight != "keep" and not can.weights_while_generating:
            return f"rollout.in_flight is for rollout.engine={engines.that('weights_while_generating')}"
        if self.transfer == "broadcast" and not can.broadcast:
            return f"rollout.transfer=broadcast is for rollout.engine={engines.that('broadcast')}"
        return ""

    @property
    def capabilities(self) -> RolloutCapabilities:
        """Of its engine; one's own is loaded for it. Raises ConfigError."""
        return ROLLOUT_ENGINES.capabilities(self.engine)


class Learner(Section):
    """The DeepSpeed ZeRO learner."""

    ranks: int = Field(default=1, ge=1, description="actors that train together")
    num_cpus: float = Field(default=0.2, ge=0, description="CPUs that Ray reserves for each rank")
    num_gpus: float = Field(default=0, ge=0, description="GPUs of each rank")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1, description="what DeepSpeed shards over the ranks (of one in fp32: 3 alone)"
    )
    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="of the weights that train and are published")
    learning_rate: float = Field(default=1e-5, gt=0, le=1e20, description="peak")
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up")
    decay: Literal["constant", "linear", "cosine"] = Field(default="constant", description="after the warm-up")
    min_learning_rate: float = Field(default=0.0, ge=0, description="where the decay ends")
    weight_decay: float = Field(default=0.0, ge=0, le=1e10, description="AdamW's")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this global norm")
    tokens_per_batch: int = Field(default=4096, ge=1, description="most tokens in one packed micro-batch of a rank")
    updates_per_step: int = Field(default=1, ge=1, description="optimizer updates on a step's rollouts, a part each")
    deadline_seconds: float = Field(
        default=1800, gt=0, description="a learner whose call takes longer is started again; more where calls take long"
    )


class OffPolicy(Section):
    """Corrections for rollouts of another policy than the one that trains; ρ is π_old/μ (docs/methods.md)."""

    kind: Literal["auto", "none", "truncated", "masked"] = Field(
        default="auto", description="weight min(ρ, high), or ρ inside [low, high] only; auto: by the method's estimator"
    )
    low: float = Field(default=0.5, ge=0, description="masked: below it a token or sequence is rejected")
    high: float = Field(default=2.0, gt=0, description="truncated: largest weight; masked: above it, rejected")
    level: Literal["token", "sequence", "geometric"] = Field(
        default="token", description="ρ of the token, of the whole response, or its geometric mean (masked only)"
    )
    veto: float = Field(default=0.0, ge=0, lt=1, description="a response with any token's ρ below it is rejected")
    probability_gap: float = Field(default=0.0, ge=0, lt=1, description="tokens with |π_old − μ| above it are rejected")
    normalise: bool = Field(default=False, description="divide the weights by their mean over the batch")
    proximal: Literal["recompute", "behaviour", "interpolate"] = Field(
        default="recompute", description="the π_old of clipped ratios: recomputed, the sampler's, or between them"
    )

    @model_validator(mode="after")
    def _possible(self) -> "OffPolicy":
        if self.kind == "masked" and self.low >= self.high:
            raise ValueError("off_policy.low is below off_policy.high")
        if self.kind != "masked" and self.level == "geometric":
            raise ValueError("off_policy.level=geometric is for off_policy.kind=masked: it rejects, and is no weight")
        return self


class Until(Section):
    """A stage's measured end: the student's entropy has collapsed and its pass rate has stopped rising.

    Checked every `every` steps: the moving average of the entropy is below max(`floor`, `share` · its mean over the
    first `warmup` checks) for `patience` checks in a row, and the pass rate rose by less than `slope` points a check.
    Rule: ours (shared by no paper); it never switches back.
    """

    trigger: Literal["entropy_collapse"] = Field(description="what is measured")
    every: int = Field(default=5, ge=1, description="steps between two checks")
    warmup: int = Field(default=2, ge=1, description="checks whose mean is the entropy at the start")
    smoothing: float = Field(default=0.3, gt=0, le=1, description="weight of the newest check in the moving average")
    share: float = Field(default=0.45, ge=0, lt=1, description="of the entropy at the start")
    floor: float = Field(default=0.05, ge=0, description="nats")
    patience: int = Field(default=2, ge=1, description="checks in a row")
    slope: float = Field(default=0.2, description="points of pass rate a check")


class Stage(Section):
    """One part of a run: a method until its steps are done or its trigger fires."""

    method: str = Field(description="a composition of cluster/methods/")
    method_options: dict[str, Any] = Field(default_factory=dict, description="the method's own options")
    steps: int = Field(ge=1, description="optimizer steps, or the most where `until` may end it before")
    until: Until | None = Field(default=None, description="a measured end")
    learning_rate: float | None = Field(default=None, gt=0, description="peak; none: learner.learning_rate")

    @model_validator(mode="after")
    def _can_fire(self) -> "Stage":
        if self.until:
            need = self.until.every * (self.until.warmup + self.until.patience)
            if need > self.steps:
                raise ValueError(
                    f"a stage's trigger must be able to fire: {self.method} has {self.steps} steps, and until needs "
                    f"every · (warmup + patience) = {need}"
                )
            if self.until.share == 0 and self.until.floor == 0:
                raise ValueError("a stage's trigger must be able to fire: until.share and until.floor are both 0")
        return self


class Checkpoint(Section):
    """Checkpoints on the way; one is always saved at the end and when interrupted."""

    minutes: float = Field(default=10.0, gt=0, description="one is saved after the first step that ends so long after")
    every: int = Field(default=0, ge=0, description="and after every so many steps; 0: by time alone")
    keep: int = Field(default=2, ge=1, description="newest ones kept")


class Metrics(Section):
    """The Prometheus endpoint."""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=0, ge=0, le=65535, description="0 takes a free one, and the run prints it")


class Config(Section):
    """A run. `teacher` is the one teacher; `teachers` names several, and rows of the data say which to ask."""

    method: str = Field(default="", description="a composition of cluster/methods/, or one's own: FILE.py or MODULE")
    method_options: dict[str, Any] = Field(default_factory=dict, description="the method's own options")
    seed: int = Field(default=0, ge=0, description="of everything that is drawn")
    output_dir: str = Field(description="the run's folder, new or empty")
    steps: int = Field(default=0, ge=0, description="optimizer steps")
    stages: tuple[Stage, ...] = Field(default=(), description="in place of method and steps: one after the other")
    prompts_per_step: int = Field(ge=1, description="prompt groups that a step trains")
    max_staleness: int = Field(default=0, ge=0, description="steps that rollouts may be behind; 0 is synchronous")
    thinking: tuple[str, str] = Field(
        default=THINKING,
        description="the marks around the model's reasoning; what stands before the second is never the answer",
    )
    record: Literal["none", "some", "all"] = Field(
        default="some", description="rollouts of each step that rollouts.jsonl shows with their verdicts"
    )
    templates: dict[str, str] = Field(
        default_factory=dict, description="prompt templates of one's own, by NAME@VERSION"
    )
    student: Student
    teacher: Teacher | None = None
    teachers: dict[str, Teacher] = Field(default_factory=dict, description="several by name, each with teacher's keys")
    reference: Reference | None = None
    data: Data
    replay: Replay | None = None
    rollout: Rollout = Rollout()
    teacher_rollout: ModelPool = Field(
        default=ModelPool(), description="the teacher as a generator, for methods that ask for it"
    )
    verifier: Verifier = Verifier()
    skills: Skills | None = None
    strategies: Strategies | None = None
    learner: Learner = Learner()
    off_policy: OffPolicy = OffPolicy()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    guards: Guards = Guards()
    notify: Notify = Notify()
    autoscale: Autoscale = Autoscale()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.stages and (self.method or self.steps or self.method_options):
            raise ValueError("give either stages, or method, method_options and steps")
        if not self.stages and not self.method:
            raise ValueError("method: required, and not given (or give stages)")
        if not self.stages and not self.steps:
            raise ValueError("steps: required, at least 1")
        if self.teacher and self.teachers:
            raise ValueError("give either teacher.model or teachers.NAME.model")
        if REFERENCE in self.teachers:
            raise ValueError(f"a teacher cannot be called {REFERENCE!r}: that is the reference model's name")
        gpus = {self.rollout.num_gpus, self.learner.num_gpus}
        if self.rollout.transfer == "broadcast" and gpus != {0} and min(gpus) < 1:
            raise ValueError(
                "rollout.transfer=broadcast is between whole GPUs: give rollout and learner num_gpus of 1 or more"
            )
        if self.learner.min_learning_rate > self.learner.learning_rate:
            raise ValueError("learner.min_learning_rate must not exceed learner.learning_rate")
        return self

    @property
    def named_teachers(self) -> dict[str, Teacher]:
        """All teachers by name; the single one is called `teacher`."""
        return {"teacher": self.teacher} if self.teacher else self.teachers

    @property
    def plan(self) -> tuple[Stage, ...]:
        """The run's stages; a run without any is one."""
        one = Stage.model_construct(method=self.method, method_options=self.method_options, steps=self.steps)
        return self.stages or (one,)

    @property
    def methods(self) -> str:
        """Of its stages, one after the other, in words."""
        return " → ".join(stage.method for stage in self.plan)

    @property
    def total_steps(self) -> int:
        """Steps of all stages, none of them ended by its trigger."""
        return sum(stage.steps for stage in self.plan)

    def of_stage(self, stage: Stage) -> "Config":
        """The configuration of one stage alone, as methods read it."""
        rate = stage.learning_rate or self.learner.learning_rate
        floor = min(rate, self.learner.min_learning_rate)
        learner = self.learner.model_copy(update={"learning_rate": rate, "min_learning_rate": floor})
        own = {"method": stage.method, "method_options": stage.method_options, "steps": stage.steps, "stages": ()}
        return self.model_copy(update={**own, "learner": learner})


REFERENCE = "reference"  # the reference model's place among the teachers
