"""Student rollouts: prompts in, sampled responses out, with the logprobs of the sampler as it sampled."""
