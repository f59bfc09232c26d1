"""Discrete diffusion framework: a process object determines bound, loss, sampler and evaluation.

Importing the package imports none of its modules, and sets the variable OMP_WAIT_POLICY unless the
user did. `__init__.pyi` lists the public names, for type checkers and for lazy_loader, which
imports a name when it is first used.
"""

import os

import lazy_loader

# OpenMP threads that spin while they wait slow down a busy machine: on two cores with two other
# processes, sampling took 5 times as long. The variable must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
