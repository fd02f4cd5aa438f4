"""A start that already holds the two circuits that binding needs, written into the random weights.

Without them letters stayed at chance for 1,000 steps (docs/embedded-model.md): to learn that the
letter stands two tokens before its word is worth nothing until words are matched, and the reverse.
Nothing is frozen: training is free to undo all of this.

1. Looking back: heads of the first layers attend to the token 1, 2 or 3 places earlier, by biases.
2. Matching: in the middle layers, query and key of some heads are the same random map, at slow
   rotary frequencies only, so that a token attends to tokens of like content wherever they stand.
3. Meaning: the word for a kind or a colour starts as the very code that image tokens carry for it,
   and the forms of a word (line start, capital, plural) start near each other.
"""

from __future__ import annotations

import math

import torch
from pretrain.common import HEADS, WIDTH, Codebook
from pretrain.words import PLURALS, WORDS
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedmllm.data.scenes import COLOURS, KINDS

HEAD = WIDTH // HEADS
PAIRS = HEAD // 2  # rotary pairs (i, i + PAIRS), frequency 10000^(-i / PAIRS)
BACK = {0: (1, 2, 3), 1: (1, 2)}  # layer -> distances its heads look back
MATCH = {1: (2, 3), 2: (0, 1), 3: (0, 1), 4: (0,)}  # layer -> heads that match contents
SHARP = 5.8  # bias of a looking-back head: its own place beats the next by a factor of e^4
SLOW = 7  # first rotary pair that hardly turns over a prompt's length


@torch.no_grad()
def look_back(attention: nn.Module, head: int, distance: int) -> None:
    """Make a head attend to the token `distance` places earlier, whatever it is."""
    rows = slice(head * HEAD, (head + 1) * HEAD)
    turn = distance * 10000 ** (-torch.arange(6) / PAIRS)
    first = torch.arange(head * HEAD, head * HEAD + 6)
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[rows] *= 0.1
        projection.bias[rows] = 0
    attention.q_proj.bias[first] = SHARP
    attention.k_proj.bias[first] = SHARP * turn.cos()
    attention.k_proj.bias[first + PAIRS] = SHARP * turn.sin()


@torch.no_grad()
def match(attention: nn.Module, head: int, scale: float = 0.13) -> None:
    """Make a head attend to tokens whose content is like the querying token's."""
    rows = torch.arange(head * HEAD, (head + 1) * HEAD)
    slow = torch.cat([rows[SLOW:PAIRS], rows[PAIRS + SLOW :]])
    shared = torch.randn(len(slow), WIDTH) * scale
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[rows] *= 0.1
        projection.weight[slow] = shared


def word_start(book: Codebook) -> dict[str, Tensor]:
    """Start vectors of the words that image tokens speak of."""
    codes = dict(zip(KINDS, book.kinds, strict=True))
    codes |= dict(zip(COLOURS, book.colours, strict=True))
    return codes


@torch.no_grad()
def name_words(table: Tensor, tokenizer: PreTrainedTokenizerBase, book: Codebook) -> None:
    """Fill the embedding table: codes for kinds and colours, like vectors for a word's forms."""
    nn.init.normal_(table, std=0.08)
    codes = word_start(book)
    stems = {plural: kind for kind, plural in PLURALS.items()}
    vocabulary = tokenizer.get_vocab()
    for word in WORDS:
        stem = stems.get(word, word)
        home = table[vocabulary.get(f"Ġ{stem}", vocabulary[stem])].clone()
        start = codes.get(stem, home)
        for form in (f"Ġ{word}", word, f"Ġ{word.capitalize()}", word.capitalize()):
            if form in vocabulary and (len(form) > 1):
                table[vocabulary[form]] = start + torch.randn(WIDTH) * 0.02


@torch.no_grad()
def wire(text_model: nn.Module, tokenizer: PreTrainedTokenizerBase, book: Codebook) -> None:
    """Write all three into a freshly initialised language model."""
    name_words(text_model.embed_tokens.weight, tokenizer, book)
    for index, layer in enumerate(text_model.layers):
        attention = layer.self_attn
        nn.init.normal_(attention.v_proj.weight, std=0.06)
        nn.init.normal_(attention.o_proj.weight, std=0.16 / math.sqrt(WIDTH) * 1.5)
        for head, distance in enumerate(BACK.get(index, ())):
            look_back(attention, head, distance)
        for head in MATCH.get(index, ()):
            match(attention, head)
