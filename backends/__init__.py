"""Floor 4: from a plan to source code that runs, in PyTorch."""
