"""The network in plain PyTorch: what tests compare with, and what benchmarks run beside ours."""
