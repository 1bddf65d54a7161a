"""What an interpreter that tests start imports first, where this folder is on its path."""

import torchvision_operators  # noqa: F401
