"""A run's own skill bank: what came of each view is counted, and the bank grows where the student still errs.

The bank is a copy in the run's folder, on the driver's machine; the service that retrieves from it runs there too. Its
version stands in every checkpoint, and a resumed run goes on from that one. What was counted since is kept here, where
the service's death cannot take it.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import lab
from ..contracts.config import Config
from ..contracts.errors import ConfigError, SkillError, VerifierError
from ..contracts.records import Polarities, StepReport
from ..contracts.verifier_config import Skills
from ..verifier_service.skills.published import load_published
from .flow.shard import Shard
from .pools.pool import Pool
from .pools.replica import Backend
from .pools.room import Tell
from .pools.services import key_of
from .recording.counters import pass_rate


def source_of(skills: Skills) -> str:
    """Where a bank comes from: a folder, an object store's path or a published file."""
    return str(lab.bank_path()) if skills.path == "lab:bank" else skills.path


def check_skills(skills: Skills) -> None:
    """What can be said of a bank before anything starts. Raises ConfigError, SkillError."""
    source = source_of(skills)
    if not find_spec("lancedb"):
        raise ConfigError("a skill bank needs the extra `skills`", "no lancedb", "pip install 'tutorloop[skills]'")
    if skills.embedder != "lexical" and not find_spec("sentence_transformers"):
        rule = "retrieval by a sentence-transformers model needs the extra `embeddings`"
        raise ConfigError(
            rule, f"skills.embedder: {skills.embedder}", "pip install 'tutorloop[embeddings]', or lexical"
        )
    key_of("skills.api_key_env", skills.api_key_env)
    if Path(source).is_file():
        kinds = {entry.kind for entry in load_published(source)}
        if kinds < {"skill", "mistake"}:
            raise SkillError("a bank has skills and mistakes", f"{source}: {', '.join(kinds) or 'neither'}")
    elif "://" not in source and not Path(source).is_dir():
        remedy = "give a bank's folder or a published file; tutorloop bank build or import makes one"
        raise SkillError("skills.path is a bank", f"{source}: no such folder or file", remedy)


class SkillBank:
    """The service and its bank in `folder`. `prompts`: a reference to the run's; `prompt_ids`: of their rows.
    Raises ConfigError, SkillError."""

    def __init__(self, config: Config, folder: Path, prompts: Any, prompt_ids: Sequence[str], backend: Backend) -> None:
        if config.skills is None:
            raise ConfigError(f"{config.method} shows its teachers skills", "no bank is given", "give skills.path")
        from ..verifier_service.skills.worker import SkillWorker  # with it LanceDB, an extra

        self.settings: Skills = config.skills
        self.prompts, self.prompt_ids = prompts, prompt_ids
        arguments: dict[str, Any] = {
            "path": str(folder),
            "source": source_of(self.settings),
            "embedder": self.settings.embedder,
            "extractor": self.settings.extractor,
            "extractor_model": self.settings.extractor_model,
            "api_key": key_of("skills.api_key_env", self.settings.api_key_env),
        }
        self.pool = Pool("skills", SkillWorker, self.settings, VerifierError, backend, on_driver_node=True, **arguments)
        self.version = 0  # of the bank as it was written last; 0: not known yet
        self._shown: list[Any] = []  # references to pairs whose outcome is not written down
        self._polarities: list[list[tuple[str, Polarities]]] = []  # what came of them

    async def ready(self, tell: Tell) -> None:
        """Once the service has opened the bank."""
        await self.pool.ready(tell)
        await self.save()
        await self._retrieve_from_now()

    def record(self, shards: Sequence[Shard], report: StepReport) -> None:
        """Count each shown entry's use, and whether it was helpful, harmful or neutral."""
        for shard in shards:
            names = {request.rollout_id: self.prompt_ids[request.row] for request in shard.requests}
            polarities = [(names[rollout], values) for rollout, values in report.polarities.items() if rollout in names]
            if shard.skills is not None and polarities:
                self._shown.append(shard.skills)
                self._polarities.append(polarities)

    async def grow(self, step: int, shards: Sequence[Shard]) -> str:
        """Update the bank from a step's rollouts where that is due and too few passed; what was done, in words."""
        own = self.settings
        passed = pass_rate(shards)
        if not own.update_every or step % own.update_every or passed is None or passed >= own.update_below:
            return ""
        since = await self.save()
        judged = [shard for shard in shards if shard.verdicts is not None]
        batches = [batch for shard in judged for batch in (shard.rollouts, shard.verdicts)]
        limits = (own.most_new, own.capacity)
        self.version, said = await self.pool.first("grow", since, *limits, self.prompts, *batches)
        await self._retrieve_from_now()
        return said

    async def save(self) -> int:
        """Write down what was counted; the version that a checkpoint names."""
        self.version = await self.pool.first("save", self.version, self._polarities, *self._shown)
        self._shown.clear()
        self._polarities.clear()
        return self.version

    async def load(self, version: int) -> None:
        """Go on from a checkpoint's version."""
        self._shown.clear()
        self._polarities.clear()
        self.version = await self.pool.first("restore", version)
        await self._retrieve_from_now()

    async def _retrieve_from_now(self) -> None:
        """Every replica, also one that starts later, retrieves from this version: counts alone change no retrieval."""
        self.pool.publish(self.version, "refresh", self.version)
        await self.pool.loaded()
