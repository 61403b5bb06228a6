"""tutorloop: distil a teacher's reasoning into a student on the student's own rollouts, on Ray.

              ┌──────────────── weights, version v ────────────────┐
              ▼                                                    │
prompts → rollout pool ─┬→ teacher pool  ─┐                        │
          actors/       │  teacher_service/├→ ready queue → learner (DeepSpeed ZeRO)
                        └→ verifier pool ─┘  cluster/       learner/
                           verifier_service/
"""

__version__ = "0.5.0"
