"""What libraries say of foreign files, in words of our own: what is wrong, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from ..base.errors import first_line

EXTRAS = {"torchvision": "vision", "num2words": "vision", "sentencepiece": "demo", "protobuf": "demo"}
"""Package -> which extra of guardfold installs it."""

PACKAGES = (*EXTRAS, "tiktoken", "timm", "einops", "mistral-common", "opencv-python")
"""Whose absence processors complain of."""


class Complaint(NamedTuple):
    """pattern: found in what a library says, whatever the case.  ours: what is said instead."""

    pattern: str
    ours: str


COMPLAINTS = (
    Complaint(
        r"operator torchvision::\w+ does not exist",
        "the torchvision that is installed was built for another torch than the one that is; install the one that fits",
    ),
    Complaint(
        r"image features and image tokens do not match",
        "its processor puts another number of image tokens into a prompt than its vision tower makes features; compare "
        "patch_size, num_additional_image_tokens, vision_feature_select_strategy or image_seq_length in "
        "processor_config.json and preprocessor_config.json with config.json",
    ),
    Complaint(
        r"legacy chat_template\.json file with separate template files",
        "chat_template.json lies beside additional_chat_templates, which transformers does not take; write its "
        "template to chat_template.jinja instead",
    ),
    Complaint(
        r"does not have a padding token",
        "its tokenizer has neither a padding token nor an end of text; name one as pad_token in tokenizer_config.json",
    ),
    Complaint(
        r"issues during automatic conversion of the weights",
        "tensors that its class puts together have other shapes than config.json says; compare it with the published "
        "one",
    ),
    Complaint(
        r"can't load (the )?tokenizer|couldn't instantiate the backend tokenizer|unable to load vocabulary",
        "its tokenizer is missing or not whole; put the published tokenizer.json (or tokenizer.model) and "
        "tokenizer_config.json into the folder",
    ),
    Complaint(
        r"unrecognized video processor|video_preprocessor_config\.json' is not a valid",
        "video_preprocessor_config.json is not one that was published with the model; put that one in its place, or "
        "remove it",
    ),
    Complaint(
        r"can't load image processor|unrecognized (image processor|processing class)",
        "its processor is missing; put the published processor_config.json or preprocessor_config.json into the folder",
    ),
)


def own_words(error: BaseException) -> str:
    """Returns what `error` of a library comes to: of a kind that is known here in words of our own, else its type and
    first line.
    """
    said = " ".join(str(part) for part in _causes(error))
    package = next((name for name in PACKAGES if name in said.lower()), None)
    if package and any(isinstance(part, ImportError) for part in _causes(error)):
        return missing(package)
    known = next(
        (complaint.ours for complaint in COMPLAINTS if re.search(complaint.pattern, said, re.IGNORECASE)), None
    )
    return known or f"{type(error).__name__}: {first_line(error)}"


def missing(package: str) -> str:
    """That a package is needed which is not there, and how to install it."""
    command = f"'guardfold[{EXTRAS[package]}]'" if package in EXTRAS else package
    return f"it needs {package}, which is not installed: pip install {command}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Returns `error`, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__
