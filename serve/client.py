"""Ask a served adapter with the openai client: python serve/client.py MODEL "QUERY" [URL]

The key, if the server needs one, is read from PI_RAY_API_KEY. The message is the query alone, without template.
"""

import os
import sys

from openai import OpenAI


def main(model: str, query: str, url: str = "http://127.0.0.1:8000") -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("PI_RAY_API_KEY", "none"))
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": query}], stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage:
            used = chunk.usage
            counts = f"{used.prompt_tokens} tokens in, {used.completion_tokens} out"
            print(f"\n[{counts}, {used.prompt_tokens_saved} not sent]", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:4])
