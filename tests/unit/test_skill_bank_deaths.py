"""A run's skill bank whose service dies: nothing that was counted is lost, and none of it counts twice."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from skill_entries import entry

from tutorloop.cluster.pools.in_process import InProcessBackend
from tutorloop.cluster.skill_bank import SkillBank
from tutorloop.contracts.arrow import encode
from tutorloop.contracts.errors import VerifierError
from tutorloop.contracts.records import Prompt
from tutorloop.contracts.verifier_config import Skills
from tutorloop.verifier_service.skills.store import SkillBank as Store

PROMPTS = encode(Prompt, [Prompt(prompt_id="p", text="halve 12", token_ids=np.array([1]), answer="")])


@pytest.fixture
def source(tmp_path):
    made = Store.open(str(tmp_path / "source"), create=True)
    made.add([entry("s1", "halve twice"), entry("m1", "forgot to halve", kind="mistake")])
    return str(tmp_path / "source")


async def opened(source, tmp_path) -> SkillBank:
    config = SimpleNamespace(skills=Skills(path=source), method="sgsd")
    bank = SkillBank(config, tmp_path / "bank", PROMPTS, ["p"], InProcessBackend())
    await bank.ready(lambda _: None)
    return bank


async def counted(bank: SkillBank) -> None:
    """One use, that helped, of the pair that is shown."""
    pairs, _ = await bank.pool.call("retrieve", 1, prompts=PROMPTS, rows=[0], k=8)
    shard = SimpleNamespace(requests=[SimpleNamespace(rollout_id="r", row=0)], skills=pairs)
    bank.record([shard], SimpleNamespace(polarities={"r": (1,)}))


def die(bank: SkillBank) -> None:
    bank.pool.lose(bank.pool.members.serving[0], _lost())


def _lost() -> VerifierError:
    return VerifierError("the skills pool keeps its actors", "killed").as_lost()


def uses(tmp_path) -> dict[str, tuple[int, int]]:
    return {e.entry_id: (e.uses, e.helpful) for e in Store.open(str(tmp_path / "bank")).entries()}


def test_counts_outlive_the_service(source, tmp_path):
    async def go() -> None:
        bank = await opened(source, tmp_path)
        for number in range(1, 4):
            await counted(bank)
            die(bank)
            await counted(bank)
            await bank.save()
            assert uses(tmp_path) == dict.fromkeys(("s1", "m1"), (2 * number, 2 * number))

    asyncio.run(go())


def test_a_write_whose_answer_was_lost_counts_once(source, tmp_path):
    async def go() -> None:
        bank = await opened(source, tmp_path)
        await counted(bank)
        first = bank.pool.members.serving[0].replica
        ask = first.ask

        def dies_after(method, *args):
            ask(method, *args)  # it has written
            answer = asyncio.get_running_loop().create_future()
            answer.set_exception(_lost())
            return answer

        first.ask = dies_after
        await bank.save()
        assert bank.pool.members.restarts == 1
        assert uses(tmp_path) == dict.fromkeys(("s1", "m1"), (1, 1))

    asyncio.run(go())


def test_a_new_replica_retrieves_from_the_version_of_the_others(source, tmp_path):
    """Not from the latest one, which counts have made."""

    async def go() -> None:
        bank = await opened(source, tmp_path)
        before = bank.version
        await counted(bank)
        assert await bank.save() > before
        die(bank)
        await bank.pool.call("retrieve", 1, prompts=PROMPTS, rows=[0], k=8)
        assert bank.pool.members.serving[0].replica.worker.version == before
        await bank.load(before)
        assert uses(tmp_path) == dict.fromkeys(("s1", "m1"), (0, 0))

    asyncio.run(go())
