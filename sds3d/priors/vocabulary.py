"""Words that a closed-vocabulary prior does not know, and learned words that stand for several tokens."""

import difflib
import re
from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def unknown_word_warnings(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """One message per unknown word with the closest known words; none for subword tokenizers.

    A word is unknown if the tokenizer turns it into its unknown token although the token exists in its table
    (open-vocabulary tokenizers never do this for plain text).
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or len(tokenizer) > 5000:
        return []
    known = [word for word in tokenizer.get_vocab() if not word.startswith("<")]
    messages = []
    for word in dict.fromkeys(piece for prompt in prompts for piece in prompt.lower().split()):
        word = word.strip(".,;:!?\"'()[]{}")
        if word and unknown in tokenizer(word, add_special_tokens=False).input_ids:
            close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
            hint = f"closest known words: {', '.join(close)}" if close else "no similar word is known"
            messages.append(f"the prior does not know the word {word!r} and will ignore it; {hint}")
    return messages


def spelled_out(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt with every learned word of several vectors as all its tokens: "<cat>" to "<cat> <cat>_1 <cat>_2"."""
    added = tokenizer.get_added_vocab()
    for word in added:
        if f"{word}_1" not in added:
            continue
        tokens = [word]
        while f"{word}_{len(tokens)}" in added:
            tokens.append(f"{word}_{len(tokens)}")
        spelled = " ".join(tokens)
        literal = spelled.replace("\\", r"\\")  # no escapes of the pattern language
        prompt = re.sub(re.escape(word) + r"(?!_\d)", literal, prompt)
    return prompt
