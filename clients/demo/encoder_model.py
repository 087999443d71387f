"""The encoder demo's model (imports torch)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .assets import MINILM_AT_HUB
from .encoder import EncoderTask, Example, topic_names
from .learning import Learner, Score
from .tasks import read_rows


class MeanPoolClassifier(BertPreTrainedModel):  # type: ignore[no-untyped-call]
    """A BERT encoder, the mean of its token vectors, and a linear classifier.

    The pooled vector has a fixed length (``head_scale``) and the classifier
    starts at zero, so that every site starts from the same even guess and the
    classes a site never sees are not pushed about by a random start.
    """

    def __init__(self, config: BertConfig, encoder: BertModel | None = None) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.bert = BertModel(config, add_pooling_layer=False) if encoder is None else encoder
        self.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        **_: object,
    ) -> SequenceClassifierOutput:
        """Return logits, and the mean cross-entropy when ``labels`` is given."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        logits = self.classifier(functional.normalize(mean, dim=-1) * self.config.head_scale)
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def load_base(model_dir: Path, task: EncoderTask, topics: Sequence[str]) -> MeanPoolClassifier:
    """Load the first ``task.layers`` layers of the pretrained encoder, with a new head."""
    encoder = AutoModel.from_pretrained(
        model_dir,
        dtype=torch.float32,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    encoder.pooler = None  # trained for another purpose
    encoder.encoder.layer = encoder.encoder.layer[: task.layers]
    config = encoder.config
    config.num_hidden_layers = task.layers
    config.label2id = {topic: number for number, topic in enumerate(topics)}
    config.id2label = dict(enumerate(topics))
    config.head_scale = task.head_scale
    return MeanPoolClassifier(config, encoder)


def add_lora(base: MeanPoolClassifier, task: EncoderTask) -> PeftModel:
    """Wrap ``base`` so that only LoRA on its last layers and the head train."""
    torch.manual_seed(task.seed)
    model = get_peft_model(
        base,
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=task.lora_rank,
            lora_alpha=task.lora_alpha,
            lora_dropout=0.0,
            target_modules=["query", "value"],
            layers_to_transform=list(range(task.layers - task.lora_layers, task.layers)),
            layers_pattern="layer",
            modules_to_save=["classifier"],
        ),
    )
    model.peft_config["default"].base_model_name_or_path = MINILM_AT_HUB
    return model


class Encoded:
    """Tokenised examples; a batch is padded to its own longest row."""

    def __init__(self, tokens: list[list[int]], labels: list[int], pad_id: int) -> None:
        self.tokens = tokens
        self.labels = labels
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The model's keyword arguments for these rows."""
        width = max(len(self.tokens[row]) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            length = len(self.tokens[row])
            ids[index, :length] = torch.tensor(self.tokens[row])
            mask[index, :length] = 1
        labels = torch.tensor([self.labels[row] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class EncoderLearner(Learner[Encoded]):
    """MiniLM with a new head, and LoRA on its last layers."""

    def __init__(self, task: EncoderTask, data: Path, model: Path) -> None:
        self._task = task
        self._data = data
        self._label = {topic: number for number, topic in enumerate(topic_names())}
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self.base = load_base(model, task, topic_names())

    def rows(self, sites: Sequence[str], split: str) -> Encoded:
        """Tokenise one split of some sites."""
        files = [self._data / site / f"{split}.jsonl" for site in sites]
        examples = [example for file in files for example in read_rows(file, Example)]
        tokens = self._tokenizer(
            [example.text for example in examples],
            truncation=True,
            max_length=self._task.max_tokens,
        )["input_ids"]
        labels = [self._label[example.label] for example in examples]
        return Encoded(tokens, labels, self._tokenizer.pad_token_id)

    def adapter(self) -> PeftModel:
        """Wrap the base with a new adapter."""
        return add_lora(self.base, self._task)

    def loss(self, model: nn.Module, rows: Encoded, batch: Sequence[int]) -> Tensor:
        """The mean cross-entropy of a batch."""
        loss: Tensor = model(**rows.batch(batch)).loss
        return loss

    def score(self, model: nn.Module, rows: Encoded) -> Score:
        """Mean cross-entropy, and for every row whether the answer is right."""
        order = sorted(range(len(rows)), key=lambda row: len(rows.tokens[row]))
        right = torch.zeros(len(rows))
        loss = 0.0
        model.eval()
        with torch.inference_mode():
            for start in range(0, len(order), self._task.eval_batch_size):
                numbers = order[start : start + self._task.eval_batch_size]
                batch = rows.batch(numbers)
                output = model(**batch)
                loss += float(output.loss) * len(numbers)
                right[numbers] = (output.logits.argmax(dim=-1) == batch["labels"]).float()
        return Score(loss / len(rows), right)
