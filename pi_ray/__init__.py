"""pi-ray turns long recurrent prompts into LoRA adapters, so that inference sends the query alone."""

__version__ = "0.1.0"
