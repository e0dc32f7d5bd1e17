"""The engine that runs vLLM in this process or on GPUs of its own."""
