"""Compressor "none", for templates that are shown whole or not at all."""

from pi_ray.config import CompressConfig


class NoCompression:
    """Returns every text unchanged; a rate between 0 and 1 is then reported as achieved 1.0."""

    def __init__(self, config: CompressConfig):
        pass

    def compress(self, text: str, rate: float) -> str:
        return text
