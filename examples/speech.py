"""Speech for the streaming examples: text spoken by eSpeak NG, and its spectrum as frames.

The package ``espeakng-loader`` carries eSpeak NG as a library with its voices; nothing is downloaded.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

TEXT = (
    "The birch canoe slid on the smooth planks. Glue the sheet to the dark blue background. It is easy to tell the "
    "depth of a well. These days a chicken leg is a rare dish. Rice is often served in round bowls. The juice of "
    "lemons makes fine punch. The box was thrown beside the parked truck. The hogs were fed chopped corn and garbage. "
    "Four hours of steady work faced us. A large size in stockings is hard to sell."
)  # the first list of the Harvard sentences (IEEE 1969), made for tests of speech

FRAME = 64
"""F, numbers of a frame."""

FRAMES_PER_SECOND = 100

_RETRIEVAL, _CHARACTERS, _UTF8 = 1, 1, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@cache
def speak(text: str = TEXT) -> tuple[np.ndarray, int]:
    """The text as samples, float32 in -1 .. 1, and how many there are per second."""
    try:
        import espeakng_loader
    except ImportError:
        raise SystemExit("the speech examples need eSpeak NG: pip install 'kvcache-core[examples]'") from None
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(_RETRIEVAL, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate <= 0:
        raise RuntimeError(f"eSpeak NG did not start: {rate}")
    parts: list[np.ndarray] = []

    def take(samples: object, count: int, _: object) -> int:
        if samples and count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _CALLBACK(take)
    library.espeak_SetSynthCallback(callback)
    spoken = text.encode()
    library.espeak_Synth(spoken, ctypes.c_size_t(len(spoken) + 1), 0, _CHARACTERS, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    library.espeak_Terminate()
    return np.concatenate(parts).astype(np.float32) / 2**15, rate


def frames(samples: np.ndarray, rate: int) -> np.ndarray:
    """Log spectrum of 25 ms every 10 ms, in bands that widen with the pitch as the ear's do: float32 [T, 64].

    A frame needs no sample behind its own 25 ms, so frames of sound that goes on are the same.
    """
    hop, width = rate // FRAMES_PER_SECOND, rate // 40
    windows = np.lib.stride_tricks.sliding_window_view(samples, width)[::hop]
    power = np.abs(np.fft.rfft(windows * np.hanning(width))) ** 2
    pitches = np.fft.rfftfreq(width, 1 / rate)
    return np.log(power @ _bands(pitches, rate / 2) + 1e-6).astype(np.float32)


def _bands(pitches: np.ndarray, highest: float) -> np.ndarray:
    """Triangles on the mel scale (Stevens, Volkmann and Newman 1937): [pitches, 64]."""
    mel = 2595 * np.log10(1 + np.array([20.0, highest]) / 700)
    edges = 700 * (10 ** (np.linspace(*mel, FRAME + 2) / 2595) - 1)
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (pitches[:, None] - low) / (middle - low)
    falling = (high - pitches[:, None]) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling))


def speech(seconds: float) -> np.ndarray:
    """Frames [T, 64] of so many seconds of speech, said again if the text is shorter."""
    samples, rate = speak()
    count = int(seconds * rate) + rate // 40
    return frames(np.resize(samples, count), rate)[: int(seconds * FRAMES_PER_SECOND)]
