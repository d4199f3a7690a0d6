"""Serving on Ray Serve: the app and its two deployments, over http/ (an OpenAI-compatible API) and engine/ (prompts to tokens)."""
