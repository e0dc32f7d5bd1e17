"""The engine that sends requests to running completions servers."""
