"""What holds after every simulated run."""

from drawn_recipes import setting
from scripted import LATE, Broken, Fate, position_of

from tutorloop.cluster.pools import watch


def unnoticed(outcome) -> int:
    """Replicas that have died a while ago, and that their pools still count on."""
    since = outcome.seconds - 2 * watch.WATCH_SECONDS
    there = [member for pool in outcome.pools for member in pool.members.serving if not member.calls]
    return sum(m.replica.dead and not m.loading and m.replica.died_at < since for m in there)


def check(outcome, recipe: tuple, fate: Fate) -> None:
    """The invariants of one run. Raises Broken."""
    config, composition = setting(*recipe)
    world, flow = outcome.world, outcome.flow
    if world.broken:
        raise world.broken
    dies_for_good = fate.learner_faults > 2 or (fate.learner_faults and fate.stop_at)
    if outcome.error and not (fate.failing_call or fate.short_call or fate.failing_load or dies_for_good):
        raise Broken(f"nothing failed, and yet: {outcome.error}")
    if outcome.finished and world.finished_steps != config.steps:
        raise Broken(f"{world.finished_steps} of {config.steps} steps, and the run says that it has finished")
    if outcome.finished is False and not fate.stop_at:
        raise Broken("the run ended before its steps, and nobody stopped it")
    goes_back = outcome.error and dies_for_good  # it may have ended on the way to its checkpoint
    if outcome.steps != list(range(1, world.finished_steps + 1)) and not goes_back:
        raise Broken(f"{world.finished_steps} steps were learnt, and {outcome.steps} written down")
    trained = [rollout for _, rollout, _, _ in world.trained]
    if len(set(trained)) < len(trained):
        raise Broken("a rollout is trained twice")
    bound = config.max_staleness + composition.round_steps - 1
    for step, rollout, version, _ in world.trained:
        if position_of(rollout) // config.prompts_per_step != step:
            raise Broken(f"{rollout} is trained in step {step}")
        if version is not None and not 0 <= step - version <= bound:
            raise Broken(f"{rollout} of weights {version} is trained in step {step}")
    if outcome.error:
        return  # what was in flight is counted where a checkpoint could be saved, and lost with the process where not
    generated = sum(shard.generated.rows for shard in flow.begun if shard.generated)
    never = ("quarantined", "learner_restarted")  # generated, or asked for again
    dropped = sum(many for reason, many in outcome.counters.dropped.items() if reason not in never)
    kept = sum(shard.generated.rows for shard in flow.left if shard.generated and shard in flow.begun)
    if len(trained) + dropped + kept != generated:
        known = f"{len(trained)} trained, {dict(outcome.counters.dropped)} dropped, {kept} kept"
        raise Broken(f"{generated} rollouts: {known}")
    if outcome.finished:
        groups = {position_of(shard.requests[0].rollout_id) for shard in flow.begun if shard.step < config.steps}
        if groups and max(groups) >= config.steps * config.prompts_per_step:
            raise Broken("a prompt group past the run's end was asked for")
        check_pools(outcome, fate)
    saved = [state["step"] for state in outcome.quiet.checkpoints.values()]
    if world.finished_steps not in saved:
        raise Broken(f"checkpoints of {saved} after {world.finished_steps} steps")


def check_pools(outcome, fate: Fate) -> None:
    """Of a run that has finished: nothing waits, and no answer was counted twice."""
    if outcome.seconds > LATE / 2:
        raise Broken(f"the run took {outcome.seconds:.0f} s: it waited for an answer that hung")
    if outcome.unnoticed:
        raise Broken(f"{outcome.unnoticed} replicas have died, and nobody has noticed")
    for pool in outcome.pools:
        calls = [*pool._backlog, *(call for member in pool.members.here for call in member.calls)]
        if left := [call for call in calls if not call.answer.done()]:
            raise Broken(f"{len(left)} calls are left in the {pool.name} pool")
        # Some that were asked beside what failed.
        unheard = fate.learner_faults or fate.lost_batches or outcome.flow.cut
        if not unheard and pool.tokens != pool.answered:
            raise Broken(f"the {pool.name} pool counted {pool.tokens} tokens, and answered with {pool.answered}")
