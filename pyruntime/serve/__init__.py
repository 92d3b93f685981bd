"""The OpenAI-compatible server; start it with ``pyruntime serve``."""
