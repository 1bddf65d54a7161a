"""What the card of a guard's adapters says: how they are loaded, and what merging them does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..publish.card import AdapterNotes
from .lora import BIASED, folders

HELD = "as a LoRA adapter of just the rank of what it changes"

BOTH = f"""\
Layers whose biases change as well are in a second adapter (`lora_bias`, which vLLM does not load); both are needed:

```python
model.load_adapter("PATH/{BIASED}", "{BIASED}")
model.base_model.set_adapter(["default", "{BIASED}"])
```"""
MERGED = """\
`with model.disable_adapter():` gives the original back; `model.merge_and_unload()` gives the folded weights."""
TIED = """\
The embedding is adapted and the head, which is tied to it, is not, so untie them before merging:

```python
model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
```"""


def notes(folder: Path, tied: bool, left_out: Sequence[str]) -> AdapterNotes:
    """What is said of the adapters in `folder`. tied: whether they adapt a tied embedding."""
    parts = [*([BOTH] if len(folders(folder)) > 1 else []), MERGED, *([TIED] if tied else [])]
    return AdapterNotes(HELD, "\n\n".join(parts), tuple(left_out))
