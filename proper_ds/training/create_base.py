"""`base create`: a small tokenizer and a small Llama from scratch on prepared text, for machines without a hub.

It learns the language of the data and the form of a question, not the tasks: where there are labels, it reads each
item with a label drawn at random, never with the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from proper_ds.data.prepared import PreparedData
from proper_ds.data.prompts import history_prompt
from proper_ds.errors import DataError
from proper_ds.model.config import CreateBase
from proper_ds.observe.log import quiet_libraries

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
LOG_EVERY = 25
MAX_TEXTS = 200_000
"""More than so small a base can learn from; it bounds the memory."""


def texts_of(prepared: PreparedData, suffix: str, train_split: str, seed: int) -> Iterator[str]:
    """What the base reads: each history item of the training users as a question, followed by an answer.

    Labels are drawn at random, so that the base knows no user's taste and no label's meaning, only what an answer
    looks like; open answers are the users' own, text like any other.
    """
    tasks = prepared.manifest.tasks
    generator = np.random.default_rng(seed)
    for user in prepared.users():
        for item in user.history if user.teaches(train_split) else ():
            labels = tasks[item.task].labels
            answer = item.answer if labels is None else labels[generator.integers(len(labels))]
            yield f"{history_prompt(tasks[item.task], item)}{suffix} {answer}"


def train_tokenizer(texts: list[str], settings: CreateBase) -> Any:
    """A byte-level BPE tokenizer in Hugging Face form: any text survives encoding and decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=settings.max_position_embeddings,
    )


def llama_config(settings: CreateBase, vocab_size: int) -> Any:
    """The base's Hugging Face configuration; special tokens are numbered as in SPECIAL."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_attention_heads,
        max_position_embeddings=settings.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
        pad_token_id=SPECIAL.index("<pad>"),
    )


def _packed_ids(texts: list[str], tokenizer: Any, seed: int) -> np.ndarray:
    """All texts, shuffled, as one line of ids with end tokens between."""
    order = np.random.default_rng(seed).permutation(len(texts))
    eos = tokenizer.eos_token_id
    parts = []
    for start in range(0, len(order), 1000):
        batch = [texts[i] for i in order[start : start + 1000]]
        parts += [np.asarray([*ids, eos], dtype=np.int64) for ids in tokenizer(batch)["input_ids"]]
    return np.concatenate(parts)


def create_base(
    prepared: PreparedData,
    settings: CreateBase,
    out: Path,
    suffix: str,
    train_split: str,
    seed: int,
    on_step: Callable[[int, int, float], None] = lambda step, num_steps, loss: None,
) -> int:
    """Train and save the base; returns its number of parameters.

    Args:
        suffix: stands between question and answer, as in the run's `base.prompt_suffix`.
        train_split: nothing is read of people who are asked in other splits only.
        on_step: called with (step, number of steps, loss) now and then.

    Raises:
        DataError: where the training users' text is too short for one sequence.
    """
    from transformers import LlamaForCausalLM, get_scheduler

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quiet_libraries(device.type == "cuda")
    texts = list(islice(texts_of(prepared, suffix, train_split, seed), MAX_TEXTS))
    width = min(128, settings.max_position_embeddings)
    tokenizer = train_tokenizer(texts, settings)
    ids = _packed_ids(texts, tokenizer, seed) if texts else np.zeros(0, dtype=np.int64)
    if len(ids) < 2 * width:
        has = ", ".join(prepared.manifest.splits) or "none"
        raise DataError(
            f"{prepared.folder}: {len(ids)} tokens in the histories of training users (split {train_split!r}; the data"
            f" has {has}) are too few to train a base; name another training split, or use base.model"
        )
    torch.manual_seed(seed)
    lm = LlamaForCausalLM(llama_config(settings, len(tokenizer)))
    lm.to(device).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = get_scheduler("cosine", optimizer, settings.max_steps // 20, settings.max_steps)
    generator = np.random.default_rng(seed)
    num_rows = max(1, settings.num_tokens_per_step // width)
    for step in range(1, settings.max_steps + 1):
        starts = generator.integers(0, len(ids) - width, num_rows)
        batch = torch.from_numpy(np.stack([ids[s : s + width] for s in starts])).to(device)
        loss = lm(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % LOG_EVERY == 0 or step == settings.max_steps:
            on_step(step, settings.max_steps, float(loss.detach()))
    lm.eval().cpu().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return sum(p.numel() for p in lm.parameters())
