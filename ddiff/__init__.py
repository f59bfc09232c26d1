"""Discrete diffusion framework: a process object determines bound, loss, sampler and evaluation.

Importing the package imports none of its modules. `__init__.pyi` lists the public names, for type
checkers and for lazy_loader, which imports a name when it is first used.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
