"""motley: your own DeepSeek, on the chips you have."""

__version__ = "0.1.0"
