"""The text that the examples train on: the language reference that ships inside every Python."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from transformers import GPT2Tokenizer

CONTEXT = 128


def read_text() -> tuple[GPT2Tokenizer, torch.Tensor, torch.Tensor]:
    """A byte-level BPE trained on the spot, the training tokens, the held-out ones by context."""
    text = "<|endoftext|>".join(topics.values())
    cut = int(0.95 * len(text))
    tokenizer = GPT2Tokenizer().train_new_from_iterator(
        [text[:cut]], vocab_size=1024, show_progress=False
    )
    train_ids = torch.tensor(tokenizer(text[:cut])["input_ids"])
    held_out = torch.tensor(tokenizer(text[cut:])["input_ids"])
    return tokenizer, train_ids, held_out[: len(held_out) // CONTEXT * CONTEXT].view(-1, CONTEXT)
