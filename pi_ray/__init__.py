"""pi-ray: long recurrent prompts become LoRA adapters, so that inference sends the query alone (PromptIntern, on Ray)."""

__version__ = "0.1.0"
