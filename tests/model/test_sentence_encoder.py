"""Sentence encoders: a text among others is the text alone, both poolings, and a mend where there is no encoder."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from proper_ds.errors import AdapterError
from proper_ds.model.sentence_encoder import SentenceEncoder

TEXTS = ["a", "b c d a b", "d d", "a b c d a b c d a b c d"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    words = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=10).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
    )
    BertModel(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_text_among_others_is_the_text_alone(folder, pooling):
    encoder = SentenceEncoder(str(folder), None, pooling, "cpu")
    ids = encoder.ids(TEXTS)
    assert [len(row) for row in ids] == [3, 7, 4, 10], "cut at what the tokenizer says"
    found_NE = encoder.embed(ids)
    assert found_NE.shape == (4, encoder.embedding_size)
    plain = BertModel.from_pretrained(folder).eval()
    for row, alone_E in zip(ids, found_NE, strict=True):
        with torch.no_grad():
            states_TE = plain(input_ids=torch.tensor([row])).last_hidden_state[0]
        wanted_E = states_TE.mean(0) if pooling == "mean" else states_TE[0]
        torch.testing.assert_close(alone_E, wanted_E, rtol=1e-4, atol=1e-5)


def test_the_answer_of_a_long_text_is_seen_whole(folder):
    encoder = SentenceEncoder(str(folder), None, "mean", "cpu")
    assert encoder.with_answer("a b", "c d") == "a b c d"
    long = " ".join(["a b"] * 20)
    (first, second) = encoder.ids([encoder.with_answer(long, answer) for answer in ("c d", "d d d")])
    assert first == [2, 4, 5, 4, 5, 4, 5, 6, 7, 3], "eight words between the marks, the answer's two the last"
    assert second == [2, 4, 5, 4, 5, 4, 7, 7, 7, 3]


def test_no_text_is_no_token(folder):
    assert SentenceEncoder(str(folder), None, "mean", "cpu").ids([]) == []


def test_a_missing_encoder_is_told(tmp_path):
    with pytest.raises(AdapterError, match=r"pplug\.encoder .*frozen base"):
        SentenceEncoder(str(tmp_path / "none"), None, "mean", "cpu")
