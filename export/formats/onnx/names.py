"""What the graphs call their inputs and the sizes of their axes: the names that transformers.js resolves."""

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
"""Axes of the decoder; for an empty cache transformers.js resolves nothing but batch_size."""

DEEPSTACK = "deepstack_features"
"""What the vision graph hands to the decoder's first layers, in families that do so."""
