"""Keras must run on TensorFlow; anything else is said at import."""

from __future__ import annotations

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"kvcache_keras needs Keras on the TensorFlow backend, and Keras runs on {keras.backend.backend()!r}; set the "
        "environment variable KERAS_BACKEND=tensorflow before Keras is first imported, or use kvcache_torch for "
        "PyTorch models"
    )
