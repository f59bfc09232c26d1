"""ddiff: discrete diffusion, one process object from which bound, loss, sampler and evaluation follow."""
__version__ = "0.1.0"
