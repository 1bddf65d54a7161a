"""guardfold: a vision-language model's safety guard, folded into plain weights."""

__version__ = "0.1.0"
