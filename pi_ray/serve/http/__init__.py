"""OpenAI's API: what clients send and get (schemas, streaming), and who may ask (keys).

Takes anything that lists models and completes requests (api.CompletionBackend); knows neither Ray nor torch.
"""
