"""From a request to its text: prompt ids and adapter (completion), continuous batching (scheduler, kv_cache, multi_lora), and ids back into text (detokenizer)."""
