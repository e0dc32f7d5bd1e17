"""What Hugging Face models are made of, and which of them trees run through."""
