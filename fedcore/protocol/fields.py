"""The types of the messages' fields, and their limits. Each is checked before it is used."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AfterValidator, Field, StringConstraints

from .frames import MAX_CONTROL_BYTES

DEFAULT_CHUNK_BYTES: Final = 1 << 20
MAX_WEIGHT: Final = (1 << 64) - 1
MAX_METRICS: Final = 64
MAX_NAME: Final = 128
MAX_FEATURES: Final = 64
MAX_SETS: Final = 16
MAX_GROUPS: Final = 256
"""Groups of tensors that do not travel; see `fedcore.files.frozen`."""
MAX_ANSWER_BYTES: Final = 1 << 20
MAX_TENSORS: Final = 1_000_000
MAX_LISTED: Final = 100_000
"""Tensors of a message that lists them; a table of more is packed."""
MAX_TENSOR_NAME: Final = 1024
RESERVED_NAME: Final = "__metadata__"
"""The key of a safetensors header that is no tensor."""
SMALL_BYTES: Final = 128 << 10
"""What a message may have that neither declares tensors nor answers, with room for text that is spelled out."""
MAX_DECLARE_BYTES: Final = MAX_CONTROL_BYTES - SMALL_BYTES
REPEAT_SECONDS: Final = 5.0
"""A site says something at least this often, so that a server that does not know it can ask it to join again."""
RETURN_SECONDS: Final = 12.0
"""Within this time a site that is there joins a server that was started again: it redials at most two seconds
apart, and then is asked to as soon as it is heard, or speaks within ``REPEAT_SECONDS``."""
SITE_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
MODEL: Final = "model"
"""The name of the tensor set that holds a model or an update of it."""


def shown(text: str, limit: int) -> str:
    """Return a text as a log or a terminal may show it, at most ``limit`` characters.

    A line break or a tab becomes a space; whatever else is not printable (terminal escapes, marks that turn the
    direction of writing) is spelled out as in Python.
    """
    if not text.isprintable():
        spaced = (" " if c in "\n\r\t" else c for c in text[:limit])
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in spaced)
    return text[:limit]


def shown_within(limit: int) -> AfterValidator:
    """Return a validator that keeps at most ``limit`` characters of a text, as `shown` spells them."""
    return AfterValidator(lambda text: shown(text, limit))


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected printable characters")
    return text


def _tensor_name(text: str) -> str:
    if text == RESERVED_NAME:
        raise ValueError("model files call their header so; rename the tensor")
    return _printable(text)


SiteName = Annotated[str, StringConstraints(pattern=SITE_NAME)]
MetricName = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_NAME), shown_within(MAX_NAME)
]
Metrics = Annotated[
    dict[MetricName, Annotated[float, Field(allow_inf_nan=True)]], Field(max_length=MAX_METRICS)
]
MetricRows = Annotated[
    dict[MetricName, Annotated[int, Field(ge=0, le=MAX_WEIGHT)]], Field(max_length=MAX_METRICS)
]
SetId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
LayoutHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(max_length=4096), shown_within(4096)]
Version = Annotated[str, StringConstraints(max_length=64), shown_within(64)]
Round = Annotated[int, Field(ge=0, le=1_000_000)]
Steer = Literal["pause", "resume", "stop", "evaluate"]
Weight = Annotated[int, Field(ge=1, le=MAX_WEIGHT)]
SetName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
Features = Annotated[
    dict[
        Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")],
        Annotated[int, Field(ge=1, lt=1 << 16)],
    ],
    Field(max_length=MAX_FEATURES),
]
"""What a side can do, each with the number of the latest form that it knows; unknown ones mean nothing."""
UpdateEncoding = Literal["raw", "bf16", "fp16", "int8", "nf4", "top-k"]
"""How the floats of an update travel; the encodings of ``docs/protocol.md``."""
UPDATE_ENCODINGS: Final[tuple[str, ...]] = get_args(UpdateEncoding)
"""Their names, in the order of the numbers that chunks carry."""


def _scalars(value: Any) -> Any:
    """Check an output by hand: each of a million wrong ones would have an error of its own, and several kinds."""
    for one in value if isinstance(value, list) else (value,):
        if type(one) not in (bool, int, float, str):
            raise ValueError("expected a number, a text or a list of them")
    return value


Outputs = Annotated[
    dict[MetricName, Annotated[Any, AfterValidator(_scalars)]],
    Field(min_length=1, max_length=MAX_METRICS),
]
"""Numbers, texts and lists of them, by name."""


def few(value: Any) -> Any:
    """Count what a dict has before each of its entries is looked at, and has an error of its own."""
    if isinstance(value, dict) and len(value) > 16:
        raise ValueError("expected at most 16 entries")
    return value


TensorEntry = tuple[
    Annotated[
        str,
        StringConstraints(min_length=1, max_length=MAX_TENSOR_NAME),
        AfterValidator(_tensor_name),
    ],
    Annotated[str, StringConstraints(max_length=8), AfterValidator(_printable)],
    Annotated[list[Annotated[int, Field(ge=0, lt=1 << 48)]], Field(max_length=16, fail_fast=True)],
]
TensorTable = Annotated[list[TensorEntry], Field(max_length=MAX_TENSORS, fail_fast=True)]
Role = Literal["parameter", "buffer", "integer", "lora-a", "lora-b"]
"""What a tensor is to its model; see `fedcore.roles`."""
LoraMethod = Literal["factors", "freeze-a", "alternate", "share-a", "exact"]
"""How the two factors of LoRA adapters are combined; see `fedcore.adapters.forms`."""
LORA_METHODS: Final[tuple[str, ...]] = get_args(LoraMethod)
MAX_RANK: Final = 4096
"""The highest rank that a global model of adapters may have."""
FrozenTable = Annotated[
    list[
        tuple[
            Annotated[str, StringConstraints(min_length=1, max_length=200), shown_within(200)],
            Annotated[str, StringConstraints(min_length=1, max_length=64), shown_within(64)],
            Annotated[int, Field(ge=1, lt=1 << 32)],
            Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{32})?$")],
        ]
    ],
    Field(max_length=MAX_GROUPS, fail_fast=True),
]
"""Groups of tensors that do not travel: name, form, number and digest of each; see `fedcore.files.frozen`."""
