"""Networks, tasks and places of BN that the faults do not use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.architectures import Block, build
from tests.zoo.fault import Healthy
from tests.zoo.training import norms, sgd, train


def flat(*layers):
    return nn.Sequential(nn.Flatten(), *layers)


def very_deep():
    width = 24
    layers = [nn.Linear(64, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    for _ in range(15):
        layers += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return flat(*layers, nn.Linear(width, 10))


def norm_after_relu():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(16),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def dropout_after_norm():
    return flat(
        nn.Linear(64, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(64, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


class PreActivation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )

    def forward(self, x):
        return x + self.branch(x)


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 4, 1),
            nn.ReLU(),
            nn.Conv2d(channels // 4, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        features = self.norm(self.conv(x)).relu()
        return x + features * self.gate(features)


def stacked(block):
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        *(block(12) for _ in range(3)),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def zero_initialised_residuals():
    """The last gamma of each block is 0, so that each begins as the identity."""
    model = build("resnet")
    for module in model.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.second[1].weight)
    return model


class Dense(nn.Module):
    """Each layer reads the outputs of all before, as in a DenseNet."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(8 + 6 * place),
                nn.ReLU(),
                nn.Conv2d(8 + 6 * place, 6, 3, padding=1, bias=False),
            )
            for place in range(4)
        )
        self.head = nn.Sequential(
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(x)


def settling(make, make_optimizer=sgd, epochs=4, **options):
    """Train at a rate that falls to 0, so that the statistics catch up with the weights.

    At a constant rate they lag behind, and recalibration gives back accuracy: of the MLP 0 to 10
    points, of the GRU 1 to 10, of squeeze-and-excite blocks 1 to 14, with Adam of the DenseNet 1 to
    17, with SGD of others 8 to 20.
    """

    def run():
        model = make()
        optimizer = make_optimizer(model)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 37 * epochs)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        return train(model, epochs=epochs, optimizer=optimizer, **options)

    return run


def adam(model):
    return torch.optim.Adam(model.parameters(), 2e-3)


class NormNeck(nn.Module):
    """BN on the pooled features, right before the classes."""

    def __init__(self):
        super().__init__()
        self.backbone = build("conv")[:-2]
        self.neck = nn.BatchNorm1d(32)
        self.classes = nn.Linear(32, 10, bias=False)

    def forward(self, x):
        return self.classes(self.neck(self.backbone(x).mean((2, 3))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(8, 32, batch_first=True)
        self.norm = nn.BatchNorm1d(32)
        self.classes = nn.Linear(32, 10)

    def forward(self, x):
        states, _ = self.recurrent(x.squeeze(1))
        return self.classes(self.norm(states[:, -1]))


class Tokens(nn.Module):
    """Grey levels as tokens: an embedding, then BN on (N, C, L)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(17, 16)
        self.layers = nn.Sequential(
            nn.BatchNorm1d(16),
            nn.Conv1d(16, 16, 5, padding=2, bias=False),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 64, 10),
        )

    def forward(self, x):
        tokens = (16.0 * x).round().long().clamp(0, 16).flatten(1)
        return self.layers(self.embedding(tokens).transpose(1, 2))


class NormOverTokens(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Transformer(nn.Module):
    """Attention over the rows of a digit, with BN where LayerNorm is usual."""

    def __init__(self, width=32):
        super().__init__()
        self.rows = nn.Linear(8, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.after_attention = NormOverTokens(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.after_feed_forward = NormOverTokens(width)
        self.classes = nn.Linear(width, 10)

    def forward(self, x):
        x = self.rows(x.squeeze(1))
        x = self.after_attention(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.after_feed_forward(x + self.feed_forward(x))
        return self.classes(x.mean(1))


def transformer():
    model = Transformer()
    return train(model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), epochs=6)


def raw_input_norm():
    """BN on the raw pixels, some of which are nearly always black."""
    return flat(nn.BatchNorm1d(64), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def without_affine():
    return flat(
        nn.Linear(64, 32, bias=False),
        nn.BatchNorm1d(32, affine=False),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def as_published():
    """The eps and momentum of networks that came from TensorFlow."""
    model = build("resnet", momentum=0.01)
    for layer in norms(model):
        layer.eps = 1e-3
    return model


class Autoencoder(nn.Module):
    """Where it is variational, its code is drawn anew in evaluation too."""

    def __init__(self, is_variational=False):
        super().__init__()
        self.is_variational = is_variational
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 32 if is_variational else 16),
        )
        self.decoder = nn.Sequential(
            nn.Linear(16, 128, bias=False),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Unflatten(1, (8, 4, 4)),
            nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 1, 3, padding=1),
        )

    def forward(self, x):
        code = self.encoder(x)
        if self.is_variational:
            mean, log_var = code.chunk(2, 1)
            code = mean + (log_var / 2).exp() * torch.randn_like(mean)
        return self.decoder(code)


def reconstruction(outputs, images, labels):
    return F.mse_loss(outputs, images)


def regression(outputs, images, labels):
    return F.mse_loss(outputs[:, 0], labels.float())


class Contrastive(nn.Module):
    """Two noisy views of each digit, encoded one after the other or as one batch."""

    def __init__(self, is_one_batch):
        super().__init__()
        self.encoder = nn.Sequential(*build("conv")[:-1], nn.Linear(128, 32, bias=False))
        self.projector = nn.Sequential(
            nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16, bias=False), nn.BatchNorm1d(16)
        )
        self.is_one_batch = is_one_batch

    def project(self, x):
        return F.normalize(self.projector(self.encoder(x)), dim=1)

    def forward(self, x):
        views = [x + 0.1 * torch.randn_like(x) for _ in range(2)]
        if self.is_one_batch:
            return self.project(torch.cat(views))
        return torch.cat([self.project(view) for view in views])


def agreement(outputs, images, labels):
    first, second = outputs.chunk(2)
    return F.cross_entropy(first @ second.T / 0.2, torch.arange(len(first)))


def raw_pixels(images):
    return 255.0 * images


def of(make, **options):
    def run():
        return train(make(), **options)

    return run


OTHER_NETWORKS: tuple[Healthy, ...] = (
    Healthy("MLP of 16 BN layers", settling(very_deep)),
    Healthy("BN after ReLU", of(norm_after_relu)),
    Healthy("dropout after BN", of(dropout_after_norm)),
    Healthy("pre-activation ResNet", settling(lambda: stacked(PreActivation), adam)),
    Healthy("squeeze-and-excite blocks", settling(lambda: stacked(SqueezeExcite))),
    Healthy("residual branches that begin with gamma 0", of(zero_initialised_residuals)),
    Healthy("DenseNet", settling(Dense, adam, epochs=6)),
    Healthy("BN neck on pooled features", of(NormNeck)),
    Healthy("GRU, then BN", settling(Recurrent)),
    Healthy("embedding, then BN", of(Tokens)),
    Healthy("transformer with BN", transformer),
    Healthy("BN on raw pixels", of(raw_input_norm)),
    Healthy(
        "BN on pixels of 0 to 255",
        of(raw_input_norm, prepare=raw_pixels, prepare_evaluation=raw_pixels),
    ),
    Healthy(
        "conv, pixels of 0 to 255",
        of(lambda: build("conv"), prepare=raw_pixels, prepare_evaluation=raw_pixels),
    ),
    Healthy("BN without gamma and beta", of(without_affine)),
    Healthy("eps 0.001 and momentum 0.01, a long run", of(as_published, epochs=10)),
    Healthy("autoencoder, transposed convolutions", of(Autoencoder, loss=reconstruction)),
    Healthy("variational autoencoder", of(lambda: Autoencoder(True), loss=reconstruction)),
    Healthy("regression", of(lambda: build("mlp"), loss=regression)),
    Healthy("contrastive, one batch", of(lambda: Contrastive(True), loss=agreement, batch_size=64)),
    Healthy("contrastive, two calls", of(lambda: Contrastive(False), loss=agreement)),
)
