"""A character tokenizer saved as an ordinary Hugging Face tokenizer folder."""

from __future__ import annotations

from collections.abc import Iterable

SPECIALS = ("<pad>", "<eos>", "<mask>", "<unk>")


def character_tokenizer(alphabet: Iterable[str]):
    """One token a character; specials first (pad 0, eos 1, mask 2, unk 3). Loads back with AutoTokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *sorted(set(alphabet))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
