"""LLMLingua (Jiang et al. 2023, arXiv 2310.05736): drop the tokens with the least surprisal under a small model.

The algorithm is the `llmlingua` package's own token-level iterative compression, made to run on current transformers
and offline, with three faults mended: keys and values were handed over in a format that no longer exists; a token was
judged by the surprisal of the token after it; and a text, or its tail, shorter than one window was not compressed at
all (microsoft/LLMLingua#196).
"""

from typing import Any

import torch
from llmlingua.prompt_compressor import PromptCompressor
from transformers import DynamicCache

from pi_ray import models
from pi_ray.compress import words
from pi_ray.compress.ranking import CACHED_TEXTS
from pi_ray.config import CompressConfig
from pi_ray.models import base_files

WINDOW = 200  # tokens compressed in one step, the package's default
BLOCK = 1024  # tokens of one forward pass, so that the logits of a long text need not fit in memory


class LLMLingua(PromptCompressor):
    """Compressor "llmlingua". Loads `config.model` on the CPU in float32 (about 2 s for 135M parameters)."""

    def __init__(self, config: CompressConfig):
        # in place of the package's constructor, which fetches an encoding from the network
        with models.name_load_errors(f"compress.model '{config.model}'"):
            self.load_model(base_files.resolve_base(config.model), "cpu", {"trust_remote_code": False})
        self.model.eval()
        self.use_llmlingua2, self.cache_bos_num = False, 10  # the package's defaults
        self.oai_tokenizer = self.tokenizer  # counts for the package's report, which is not used
        self.cache_argument = models.cache_argument(self.model.__class__)
        self.positions = torch.empty(0, dtype=torch.long)
        self.first_pass: dict[bytes, torch.Tensor] = {}  # token ids of a text -> surprisal of its tokens

    def compress(self, text: str, rate: float) -> str:
        """The words with at least half of their tokens among the share `rate` of tokens that LLMLingua keeps."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) < 4:
            return text
        kept, pieces = self.kept_tokens(text, len(offsets), rate), words.word_spans(text)
        tokens = words.tokens_by_span(pieces, offsets)
        return words.join_words(text, pieces, [2 * len(kept & set(t)) >= len(t) > 0 for t in tokens])

    def kept_tokens(self, text: str, length: int, rate: float) -> set[int]:
        """Positions, among `length` tokens, that stay. Windows have one size: a shorter last one would stay whole."""
        self.positions = torch.arange(length)
        windows = -(-length // WINDOW)
        filters = {"use_context_level_filter": False, "use_sentence_level_filter": False}
        self.compress_prompt([text], rate=rate, iterative_size=length // windows, **filters)
        return set(self.positions.tolist())

    def get_compressed_input(self, loss: Any, input_ids: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        """The package's choice, applied to the positions too; with very long texts it sees only the last of them."""
        unseen = len(self.positions) - input_ids.shape[1]
        ids = self.positions[unseen:].unsqueeze(0)
        kept, *rest = super().get_compressed_input(loss, ids, attention_mask, *args, **kwargs)
        self.positions = torch.cat([self.positions[:unseen], kept[0]])
        return input_ids[:, torch.searchsorted(ids[0], kept[0])], *rest

    def get_ppl(
        self, text: str, granularity: str, input_ids: Any, attention_mask: Any, past_key_values: Any, return_kv: bool,
        end: int | None,
    ) -> Any:
        """Surprisal of tokens [past, end - 1); past is the length of `past_key_values`, (key, value) by layer.

        One cached token is computed again, because its output predicts the first token of the window. The very first
        token of a text has no token before it and counts as the most surprising one.
        """
        # the first pass over a text is the same at any rate
        whole = input_ids.numpy().tobytes() if end is None else b""
        if whole in self.first_pass:
            return self.first_pass[whole].clone(), None
        past = past_key_values[0][0].shape[2] if past_key_values else 0
        begin = max(past - 1, 0)
        end = min(end or input_ids.shape[1], past + self.max_position_embeddings)
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past_key_values or ()):
            cache.update(key[:, :, :begin], value[:, :, :begin], layer)
        parts = []
        for start in range(begin, end, BLOCK):
            stop = min(start + BLOCK, end)
            options = {"attention_mask": attention_mask[:, :stop], "use_cache": True, self.cache_argument: cache}
            with torch.no_grad():
                out = self.model(input_ids[:, start:stop], **options)
            targets = input_ids[0, start + 1 : min(stop + 1, end)]
            parts.append(torch.nn.functional.cross_entropy(out.logits[0, : len(targets)], targets, reduction="none"))
        loss = torch.cat(parts)
        if not past:
            loss = torch.cat([loss.max().view(1), loss])
        if whole:
            if len(self.first_pass) >= CACHED_TEXTS:
                self.first_pass.clear()
            self.first_pass[whole] = loss[:-1]
        layers: Any = cache.layers  # of attention; no other kind has keys and values
        return loss[:-1].clone(), [(layer.keys, layer.values) for layer in layers]
