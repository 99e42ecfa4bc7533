"""The network: DeepSeek V2 and V3, readable beside the reports, exact against independent implementations."""

from motley.model.cache import Cache
from motley.model.checkpoint import load, save
from motley.model.config import ModelConfig, Yarn
from motley.model.sizes import SIZES
from motley.model.transformer import Transformer

__all__ = ["SIZES", "Cache", "ModelConfig", "Transformer", "Yarn", "load", "save"]
