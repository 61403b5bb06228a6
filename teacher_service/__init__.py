"""Teacher scoring: exact token ids in, the teacher's logprobs, top-k or hidden states at each response token out."""
