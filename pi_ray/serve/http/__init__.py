"""OpenAI's API: what clients may send (schemas), what they get (openai_format, streaming), and who may ask (keys).

Takes anything that lists models and completes requests (api.CompletionBackend); knows neither Ray nor torch.
"""
