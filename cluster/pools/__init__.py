"""Replicas, wherever they run: their calls, their weights, their places."""
