"""A start that already holds the two circuits that binding needs, written into the random weights.

To learn that the letter stands two tokens before its word is worth nothing until words are
matched, and the reverse. Nothing is frozen: training is free to undo all of this. It is a help, not
the cure: the cure was one question a row, which also worked without it (docs/embedded-model.md).

1. Looking back: heads of the first layers attend to the token 1, 2 or 3 places earlier, by biases.
2. Matching: in the middle layers, query and key of some heads are the same random map, at slow
   rotary frequencies only, so that a token attends to tokens of like content wherever they stand.
3. Meaning: the word for a kind or a colour starts as the very code that image tokens carry for it,
   and the forms of a word (line start, capital, plural) start near each other.
"""

from __future__ import annotations

import torch
from pretrain.common import HEADS, WIDTH, Codebook
from pretrain.words import PLURALS, WORDS
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedmllm.data.scenes import COLOURS, KINDS

HEAD = WIDTH // HEADS
PAIRS = HEAD // 2  # rotary pairs (i, i + PAIRS), frequency 10000^(-i / PAIRS)
SHARP = 5.8  # bias of a looking-back head: its own place beats the next by a factor of e^4
SLOW = 7  # first rotary pair that hardly turns over a prompt's length
COPY = 0.08  # output scale at which a copied embedding is as large as the embedding itself


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
def match(attention: nn.Module, head: int, asks: Tensor, keys: Tensor, scale: float = 1.5) -> None:
    """Attend to tokens whose content along `keys` is like one's own along `asks` (HEAD, W)."""
    rows = torch.arange(head * HEAD, (head + 1) * HEAD)
    slow = torch.cat([rows[SLOW:PAIRS], rows[PAIRS + SLOW :]])
    mix = torch.randn(len(slow), HEAD) * scale / HEAD**0.5
    for projection, basis in ((attention.q_proj, asks), (attention.k_proj, keys)):
        projection.weight[rows] *= 0.1
        projection.weight[slow] = mix @ basis


@torch.no_grad()
def carry(attention: nn.Module, head: int, reads: Tensor, writes: Tensor) -> None:
    """What the head attends to is copied from the subspace `reads` into `writes` (HEAD, W)."""
    rows = slice(head * HEAD, (head + 1) * HEAD)
    attention.v_proj.weight[rows] = reads
    attention.o_proj.weight[:, rows] = COPY * writes.T


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
    """Write all three into a freshly initialised language model.

    Layer 0 notes at each token what stands 1 (apart from all else), 2 and 3 places before it.
    Layer 1 goes from a word to the places just after its earlier occurrences, and to its likes.
    Layer 2 brings to the answer's first tokens what was found at the question's last word.
    Other heads copy whatever they come to attend to.
    """
    name_words(text_model.embed_tokens.weight, tokenizer, book)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    named, before, found = (basis[i * HEAD : (i + 1) * HEAD] for i in range(3))
    attention = [layer.self_attn for layer in text_model.layers]
    for layer in attention:
        for head in range(HEADS):
            carry(layer, head, found, found)
    for head, distance in ((0, 1), (1, 2), (2, 3)):
        look_back(attention[0], head, distance)
    carry(attention[0], 0, named, before)
    match(attention[1], 0, named, before)
    match(attention[1], 1, named, named)
    match(attention[2], 0, named, named)
    match(attention[2], 1, named, before)
    for head, distance in ((2, 5), (3, 6)):
        look_back(attention[2], head, distance)
    match(attention[3], 0, named, named)
    match(attention[3], 1, found, named)
