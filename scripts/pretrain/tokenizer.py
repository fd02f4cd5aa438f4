"""Stage `tokenizer`: a byte-level BPE whose whole words are the model's words.

Every word of `words.WORDS` is one token with a space before it and one at a line's start.
Whatever else is written falls apart into pieces and, at worst, into bytes: nothing is lost.
The punctuation that ends a line takes the line break with it, which saves a tenth of a prompt.
"""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.words import CAPITALS, WORDS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Idefics3ImageProcessorPil, Idefics3Processor, PreTrainedTokenizerFast

SPECIALS = (
    "<pad>",
    "<bos>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
)
# words with _ - ' inside | one digit | one sign, with the line break after it | space
PIECES = r" ?[\p{L}_][\p{L}\p{M}_'-]*| ?\p{N}| ?[^\s\p{L}\p{N}_]\n?|\n| +(?=\S)|\s+?"
PIECE_MERGES = 160  # joined letter pairs, for words that are not in the list
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}:"
    "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %} {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>{{ '\\n' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<end_of_utterance>{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def whole_tokens() -> list[str]:
    """Texts that must be one token each."""
    signs = [f"{sign}\n" for sign in ".?:!),"] + [" (", ' "']
    letters = [f" {chr(65 + i)}" for i in range(26)]
    capitals = [form for word in CAPITALS for form in (word, f" {word}")]
    return [*(form for w in WORDS for form in (w, f" {w}")), *capitals, *signs, *letters]


def train_tokenizer() -> Tokenizer:
    """Learn the pieces from the word list, then add the whole words."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = splitter
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + PIECE_MERGES, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator([f"{word} {word}" for word in WORDS], trainer)
    learnt = json.loads(learner.to_str())["model"]
    vocab = {}
    for text in (*SPECIALS, *learnt["vocab"], *map(_bytes_as_text, whole_tokens())):
        vocab.setdefault(text, len(vocab))
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return tokenizer


def _bytes_as_text(text: str) -> str:
    """The byte-level alphabet's spelling of a text, e.g. a space becomes Ġ."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in pieces.pre_tokenize_str(text))


def build_processor() -> Idefics3Processor:
    """Tokenizer, chat template, and an image processor that makes any picture 64x64."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        bos_token="<bos>",
        eos_token="<end_of_utterance>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="right",
    )
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False,
        do_convert_rgb=True,
        do_resize=True,
        size={"longest_edge": 64},
        max_image_size={"longest_edge": 64},
        do_pad=True,  # a batch may mix samples with and without a picture
    )
    return Idefics3Processor(images, tokenizer, image_seq_len=16, chat_template=CHAT_TEMPLATE)


def write_processor(folder: Path) -> Idefics3Processor:
    """Save everything that AutoProcessor reads."""
    processor = build_processor()
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    return processor
