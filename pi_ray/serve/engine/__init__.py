"""From a request to its text: completion.py finds adapter and prompt ids, an engine generates, detokenizer.py decodes.

TransformersEngine (engine.py) has scheduler, kv_cache, prefix_cache, multi_lora and sampling; VllmEngine asks vLLM.
"""
