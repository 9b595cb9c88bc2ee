"""Concordia: LLM inference that survives failures. The public names of the library; importing it
loads neither CUDA, torch nor vLLM.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
