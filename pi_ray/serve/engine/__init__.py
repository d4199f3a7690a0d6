"""From a request to its text: completion.py finds adapter and prompt ids, an engine generates, detokenizer.py decodes.

TransformersEngine (engine.py) batches continuously: scheduler, kv_cache, prefix_cache, multi_lora, sampling. VllmEngine
(vllm.py) asks vLLM. Nothing here imports serve/http or the deployments.
"""
