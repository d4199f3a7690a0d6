"""White space does not count where prompts are compared: clients wrap lines and indent as they like."""

import re


def collapse_whitespace(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def text_behind(text: str, collapsed: str) -> str:
    """`text` behind its beginning, which is `collapsed` but for white space."""
    count = len(collapsed.replace(" ", ""))
    for word in re.finditer(r"\S+", text):
        if count <= len(word[0]):
            return text[word.start() + count :]
        count -= len(word[0])
    return ""
