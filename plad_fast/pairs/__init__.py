"""The pair factory: two models' answers to prompts, their scores, and preference pairs of them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
