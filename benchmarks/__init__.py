"""Benchmarks, by python -m: benchmarks.pipeline (input alone), benchmarks.gpu_input (input into the real step)."""
