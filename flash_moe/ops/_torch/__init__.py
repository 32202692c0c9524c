"""PyTorch in bounded memory: what a CPU runs and any GPU can. Pure functions, no autograd, the same bits every run."""
