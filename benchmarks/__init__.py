"""Benchmarks behind every figure the README quotes: quality and latency."""
