"""What is written down and shown of a run: metrics, rollouts, progress, report, checkpoints."""
