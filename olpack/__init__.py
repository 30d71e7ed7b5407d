"""olpack: from a base model and a data set to quantized assistants that Ollama serves, and the measured reasons to pick one."""

__version__ = "0.1.0"
