"""Chat completions from any OpenAI-compatible endpoint."""
