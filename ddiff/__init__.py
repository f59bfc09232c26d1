"""ddiff: discrete diffusion, one process object from which bound, loss, sampler and evaluation follow.

Importing the package imports nothing else: `__init__.pyi` lists the public names, once for type
checkers and for this module, which imports a name from its module when it is first used.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
