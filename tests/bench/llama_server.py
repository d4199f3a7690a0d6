"""llama.cpp's server, by its Python package, as what a person with a CPU would pick: a peer of tests.bench.serve.

    python -m tests.bench.llama_server MODEL.gguf --port 8080 --parallel 16

`write_gguf` gives it the weights that the other sides serve, in F16 or Q8_0: the packaged model's GGUF with other
tensors, chat template and end token.
"""

from __future__ import annotations

import argparse
import os
import threading
from pathlib import Path

KINDS = ("F16", "Q8_0")
CONTEXT = 512  # tokens of one request, more than any of them has


def write_gguf(model: Path, chat_template: str, kind: str, path: Path) -> Path:
    """`model`, a folder with a Llama of the packaged model's shape, as a GGUF file with matrices of `kind`."""
    import gguf
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pi_ray.models.base_files import gguf_file
    from pi_ray.store.gguf_adapter import interleave_halves

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    config, quantised = loaded.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    own = {"general.architecture", "general.file_type", "tokenizer.chat_template", "tokenizer.ggml.eos_token_id"}
    for name, field in gguf.GGUFReader(gguf_file("smollm2-135m")).fields.items():
        if name not in own and not name.startswith("GGUF."):
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_chat_template(chat_template)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in loaded.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        if count := heads.get(name.split(".")[-2]):
            values = interleave_halves(values, count)
        kept = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else quantised
        data = gguf.quants.quantize(np.ascontiguousarray(values), kept)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def main() -> None:
    import xllamacpp

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parallel", type=int, default=16)
    args = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.n_parallel = str(args.model), args.port, args.parallel
    params.n_ctx, params.cache_prompt, params.use_jinja, params.ui = args.parallel * CONTEXT, False, True, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(params)
    print(f"serving at {server.listening_address}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
