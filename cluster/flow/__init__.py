"""Work in flight: the way of a shard of rollouts, from its prompts to the learner."""
