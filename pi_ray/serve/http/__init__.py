"""OpenAI's API over HTTP: what clients may send (schemas), what they get (openai_format, streaming), and who may ask (keys). Knows neither Ray nor torch."""
