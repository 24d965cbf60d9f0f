"""Measuring: real models, tasks and metrics."""
