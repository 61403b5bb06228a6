"""Manifests to run tutorloop on clusters, as package data (`importlib.resources.files("tutorloop.deploy")`)."""
