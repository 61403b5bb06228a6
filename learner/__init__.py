"""The DeepSpeed ZeRO learner: joins rollouts with scores, sums named loss terms, steps, and publishes weights.

`worker.py` is one rank; `terms/` holds the losses; `packing.py` plans who trains what. Imports contracts and models
only.
"""
