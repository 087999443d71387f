"""The causal demo's model (imports torch).

LoRA sits on the last layers alone. What the layers below make of a row never changes, so it is computed once
(:meth:`CausalLearner.prepare`) and kept beside the rows; training and scoring then run the last layers only. The
numbers are the same as those of the whole model up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from .causal import CausalTask, Exchange
from .learning import Learner, Score
from .tasks import SPLITS, read_rows

_IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One tokenised exchange.

    Attributes:
        tokens: prompt and response.
        prompt: how many of them are the prompt's.
        states: what goes into the first layer that trains, [tokens, hidden size].
    """

    tokens: list[int]
    prompt: int
    states: Tensor


@dataclass(frozen=True)
class Batch:
    """Rows padded to the longest one; ``labels`` names the token that follows where it is the response's."""

    states: Tensor
    labels: Tensor


def tokenise(tokenizer: Any, exchange: Exchange, task: CausalTask) -> tuple[list[int], int]:
    """Return the tokens of an exchange, and how many of them are the prompt's.

    The turns are marked as the model knows them, without its system text. A long question is cut so that room
    for the response is left, then the response.
    """
    opening = tokenizer("<|im_start|>user\n")["input_ids"]
    closing = tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    room = task.max_tokens - task.min_response_tokens - len(opening) - len(closing)
    prompt = [*opening, *tokenizer(exchange.prompt)["input_ids"][:room], *closing]
    response = tokenizer(exchange.response + "<|im_end|>")["input_ids"]
    return (prompt + response)[: task.max_tokens], len(prompt)


def collate(rows: Sequence[Row]) -> Batch:
    """Pad on the right: a causal model's earlier positions never see it."""
    width = max(len(row.tokens) for row in rows)
    states = torch.zeros(len(rows), width, rows[0].states.shape[-1])
    labels = torch.full((len(rows), width), _IGNORED)
    for index, row in enumerate(rows):
        length = len(row.tokens)
        states[index, :length] = row.states
        labels[index, row.prompt - 1 : length - 1] = torch.tensor(row.tokens[row.prompt :])
    return Batch(states, labels)


@contextmanager
def _only(decoder: Any, layers: slice, norm: nn.Module | None = None) -> Iterator[None]:
    """Let the decoder run some of its layers, and another module in the place of its last norm."""
    whole, last = decoder.layers, decoder.norm
    decoder.layers = whole[layers]
    decoder.norm = last if norm is None else norm
    try:
        yield
    finally:
        decoder.layers, decoder.norm = whole, last


class CausalLearner(Learner[list[Row]]):
    """SmolLM2 with LoRA on its last layers; only the response counts."""

    def __init__(self, task: CausalTask, data: Path, model: Path) -> None:
        self._task = task
        self._data = data
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self.base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.base.requires_grad_(False)
        self._layers = int(self.base.config.num_hidden_layers)
        self._first = self._layers - task.lora_layers

    def _states_file(self, site: str, split: str) -> Path:
        return self._data / site / f"{split}.safetensors"

    def _tokens(self, site: str, split: str) -> list[tuple[list[int], int]]:
        rows = read_rows(self._data / site / f"{split}.jsonl", Exchange)
        return [tokenise(self._tokenizer, row, self._task) for row in rows]

    def prepare(self, site: str, notice: Callable[[int, int], None]) -> None:
        """Write what the layers below the adapter make of every row of a site."""
        tokens = {split: [row for row, _ in self._tokens(site, split)] for split in SPLITS}
        size = self._task.eval_batch_size
        total = sum(-(-len(rows) // size) for rows in tokens.values())
        done = 0
        for split, rows in tokens.items():
            states = [torch.empty(0)] * len(rows)
            order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
            for start in range(0, len(order), size):
                numbers = order[start : start + size]
                for row, state in zip(
                    numbers, self._lower([rows[n] for n in numbers]), strict=True
                ):
                    states[row] = state
                done += 1
                notice(done, total)
            save_file({"states": torch.cat(states)}, self._states_file(site, split))

    def _lower(self, rows: Sequence[list[int]]) -> list[Tensor]:
        """What goes into the first layer that trains, for every row of a batch."""
        ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        decoder = self.base.model
        with torch.no_grad(), _only(decoder, slice(self._first), nn.Identity()):
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return [hidden[index, : len(row)].clone() for index, row in enumerate(rows)]

    def rows(self, sites: Sequence[str], split: str) -> list[Row]:
        """Read one split of some sites, with the states that :meth:`prepare` wrote."""
        rows: list[Row] = []
        for site in sites:
            tokens = self._tokens(site, split)
            states = load_file(self._states_file(site, split))["states"]
            parts = torch.split(states, [len(ids) for ids, _ in tokens])
            rows += [
                Row(ids, prompt, part) for (ids, prompt), part in zip(tokens, parts, strict=True)
            ]
        return rows

    def adapter(self) -> PeftModel:
        """Wrap the base with a new adapter."""
        torch.manual_seed(self._task.seed)
        return get_peft_model(
            self.base,
            LoraConfig(
                task_type=TaskType.CAUSAL_LM,
                r=self._task.lora_rank,
                lora_alpha=self._task.lora_alpha,
                lora_dropout=0.0,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
                layers_to_transform=list(range(self._first, self._layers)),
                layers_pattern="layers",
            ),
        )

    def _each(self, model: nn.Module, rows: Sequence[Row]) -> Tensor:
        """For every row, the mean cross-entropy of its response's tokens."""
        batch = collate(rows)
        whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        with _only(whole.model, slice(self._first, None)):
            hidden = whole.model(inputs_embeds=batch.states, use_cache=False).last_hidden_state
        counted = batch.labels != _IGNORED
        losses = functional.cross_entropy(
            whole.lm_head(hidden[counted]), batch.labels[counted], reduction="none"
        )
        lengths = counted.sum(dim=1)
        owner = torch.arange(len(rows)).repeat_interleave(lengths)
        return torch.zeros(len(rows)).index_add(0, owner, losses) / lengths

    def loss(self, model: nn.Module, rows: list[Row], batch: Sequence[int]) -> Tensor:
        """The mean over a batch of the rows' losses."""
        return self._each(model, [rows[number] for number in batch]).mean()

    def score(self, model: nn.Module, rows: list[Row]) -> Score:
        """The loss of every row."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row].tokens))
        losses = torch.zeros(len(rows))
        model.eval()
        with torch.inference_mode():
            for start in range(0, len(order), self._task.eval_batch_size):
                numbers = order[start : start + self._task.eval_batch_size]
                losses[numbers] = self._each(model, [rows[number] for number in numbers])
        return Score(float(losses.double().mean()), losses)
