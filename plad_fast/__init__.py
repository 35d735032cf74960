"""plad_fast: exact, memory-saving preference losses on an LM head, and distillation with them.

Importing this package needs torch alone; each of its names is loaded when it is first used.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)

# What a star import brings needs torch alone; the trainer needs transformers.
__all__ = [name for name in _names if name not in ("PLaDConfig", "PLaDTrainer")]
