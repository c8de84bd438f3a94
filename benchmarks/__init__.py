"""Benchmarks of fastlora and its peers; `python -m benchmarks.gpu_report` is the one command."""
