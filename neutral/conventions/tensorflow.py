"""How TensorFlow's files store layers: as Keras does, for it is Keras that makes them."""

from __future__ import annotations

from dataclasses import replace

from neutral.conventions.forms import Convention
from neutral.conventions.keras import KERAS

TENSORFLOW: Convention = replace(KERAS, framework="tensorflow")
