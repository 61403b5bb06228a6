"""The only composer: it starts the pools, keeps work in flight, feeds the learner and sends the weights back."""
