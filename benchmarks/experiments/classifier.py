"""A pretrained encoder whose upper layers carry an adapter (imports torch).

What the layers below the adapter make of a text never changes, so it is computed once and kept in memory;
training and scoring then run the upper layers alone, with the same numbers up to rounding. With no layer
below, that is the whole encoder but its embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptEncoderConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from fedcore.errors import ConfigError

from .sentiment import Text

__all__ = ["METHODS", "Encoder", "Rows", "adapter_config"]

METHODS: Final = ("lora", "p-tuning", "ia3")
_HEAD_SCALE: Final = 10.0
_BATCH: Final = 64


def adapter_config(method: str) -> Any:
    """Return PEFT's config of a method: the one line that changes from method to method."""
    common: dict[str, Any] = {"task_type": TaskType.SEQ_CLS, "modules_to_save": ["classifier"]}
    if method == "lora":
        return LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], **common)
    if method == "p-tuning":
        return PromptEncoderConfig(num_virtual_tokens=8, encoder_hidden_size=128, **common)
    if method == "ia3":
        return IA3Config(
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
            **common,
        )
    raise ConfigError(f"there is no method {method!r}; there are {', '.join(METHODS)}")


@dataclass(frozen=True)
class Rows:
    """Texts after the lower layers: one [tokens, hidden size] tensor each, and the class numbers."""

    states: list[Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def pick(self, numbers: Sequence[int]) -> Rows:
        """Some of the rows."""
        return Rows([self.states[n] for n in numbers], self.labels[list(numbers)])

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The model's keyword arguments for these rows, padded to the longest."""
        states = [self.states[number] for number in numbers]
        width = max(len(state) for state in states)
        mask = torch.zeros(len(states), width, dtype=torch.long)
        for index, state in enumerate(states):
            mask[index, : len(state)] = 1
        padded = nn.utils.rnn.pad_sequence(states, batch_first=True)
        return {
            "inputs_embeds": padded,
            "attention_mask": mask,
            "labels": self.labels[list(numbers)],
        }


class _Ready(nn.Module):
    """In the place of an encoder's embeddings: what comes in has been embedded already."""

    def forward(self, *, inputs_embeds: Tensor, **_: object) -> Tensor:
        return inputs_embeds


class _Classifier(nn.Module):
    """The upper layers, the mean of their token vectors at a fixed length, and a linear head that starts at
    zero."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.config = encoder.config
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    @property
    def device(self) -> torch.device:
        """Where PEFT puts virtual tokens."""
        return self.classifier.weight.device

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, labels: Tensor, **_: object
    ) -> SequenceClassifierOutput:
        hidden = self.encoder(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask
        ).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        logits = self.classifier(functional.normalize(pooled, dim=-1) * _HEAD_SCALE)
        return SequenceClassifierOutput(
            loss=functional.cross_entropy(logits, labels), logits=logits
        )


class Encoder:
    """A pretrained encoder in two parts.

    Args:
        model: a folder or a name at the Hub of a BERT-like encoder.
        layers: how many of its layers are used; all if 0.
        frozen: how many of those lie below the adapter.
        max_tokens: where a text is cut.
    """

    def __init__(self, model: Path | str, layers: int, frozen: int, max_tokens: int) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._encoder: Any = AutoModel.from_pretrained(
            model, dtype=torch.float32, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0
        )
        stack = getattr(getattr(self._encoder, "encoder", None), "layer", None)
        if stack is None or not hasattr(self._encoder, "embeddings"):
            raise ConfigError(
                f"{model}: a {type(self._encoder).__name__} has not the shape of BERT: embeddings, encoder.layer"
            )
        self._encoder.pooler = None
        self._encoder.requires_grad_(False)
        used = stack[: layers or len(stack)]
        if not 0 <= frozen < len(used):
            raise ConfigError(f"{frozen} of {len(used)} layers below the adapter: none is left")
        self.lower, self.upper = used[:frozen], used[frozen:]
        self.embeddings = self._encoder.embeddings
        self._max_tokens = max_tokens

    def rows(self, texts: Sequence[Text], labels: Sequence[str]) -> Rows:
        """Run texts through the lower layers."""
        tokens = self._tokenizer(
            [text.text for text in texts], truncation=True, max_length=self._max_tokens
        )["input_ids"]
        self._encoder.embeddings, self._encoder.encoder.layer = self.embeddings, self.lower
        self._encoder.eval()
        with torch.no_grad():  # one by one: a text's states must not depend on what else there is
            states = [
                self._encoder(input_ids=torch.tensor([row])).last_hidden_state[0].clone()
                for row in tokens
            ]
        number_of = {label: number for number, label in enumerate(labels)}
        return Rows(states, torch.tensor([number_of[text.label] for text in texts]))

    def adapter(self, method: str, classes: int, seed: int) -> PeftModel:
        """Return the upper layers with a new adapter and a new head, the same for every site."""
        return self.adapted(adapter_config(method), classes, seed)

    def adapted(self, config: Any, classes: int, seed: int) -> PeftModel:
        """Return the upper layers with the adapter that PEFT's ``config`` describes, and a new head."""
        self._encoder.embeddings, self._encoder.encoder.layer = _Ready(), self.upper
        upper = copy.deepcopy(self._encoder)  # an adapter changes the model that it is put into
        torch.manual_seed(seed)
        model: PeftModel = get_peft_model(_Classifier(upper, classes), config)
        return model


def accuracy(model: nn.Module, rows: Rows) -> tuple[float, Tensor]:
    """Return the mean loss, and for every row whether the answer is right, in bf16 arithmetic.

    Scoring is most of the work where many test rows meet few training steps, and bf16 halves it.
    """
    order = sorted(range(len(rows)), key=lambda row: len(rows.states[row]))
    right, loss = torch.zeros(len(rows)), 0.0
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for start in range(0, len(order), _BATCH):
            numbers = order[start : start + _BATCH]
            batch = rows.batch(numbers)
            output = model(**batch)
            loss += float(output.loss) * len(numbers)
            right[numbers] = (output.logits.argmax(dim=-1) == batch["labels"]).float()
    return loss / len(rows), right
