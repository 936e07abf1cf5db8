"""A small U-Net that takes the noise off scikit-learn's handwritten digits, in pipeline stages if you like.

    python unet_pipeline.py                                         one ordinary process
    downpour run -w 2 -s 2 unet_pipeline.py                         two replicas
    downpour run -w 3 -s 1 --pipeline 3 unet_pipeline.py            one replica of three stages
    downpour run -w 6 -s 2 --pipeline 3 --microbatches 4 unet_pipeline.py

Shows `downpour.forward_backward`, and skips over several stages: what the way down has computed goes straight to the
stage of the way up that uses it. GroupNorm looks at each image by itself, so micro-batches change no result.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import digits_data
import downpour


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small U-Net to take the noise off scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training data")
    parser.add_argument("--batch-size", type=int, default=32, help="samples per step of one replica")
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--noise", type=float, default=0.5, help="standard deviation; pixels are 0 to 1")
    parser.add_argument("--channels", type=int, default=16, help="channels at full size, a multiple of 4")
    parser.add_argument("--split", help="modules that begin a stage, as up1,leave (default: found by measuring)")
    parser.add_argument("--log-every", type=int, default=10, help="steps between two downpour.log calls")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def block(inputs: int, outputs: int) -> nn.Sequential:
    weights = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
    return nn.Sequential(weights, nn.GroupNorm(4, outputs), nn.ReLU())


class UNet(nn.Module):
    """Input and output: images of shape (batch, 1, 8, 8)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(block(1, channels), block(channels, channels))
        self.down1 = nn.Sequential(nn.MaxPool2d(2), block(channels, 2 * channels))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), block(2 * channels, 4 * channels))
        self.up1 = nn.Sequential(nn.ConvTranspose2d(4 * channels, 2 * channels, 2, stride=2), nn.ReLU())
        self.join1 = block(4 * channels, 2 * channels)
        self.up2 = nn.Sequential(nn.ConvTranspose2d(2 * channels, channels, 2, stride=2), nn.ReLU())
        self.join2 = block(2 * channels, channels)
        self.leave = nn.Conv2d(channels, 1, kernel_size=1)

    def forward(self, noisy: Tensor) -> Tensor:
        full = self.enter(noisy)
        half = self.down1(full)
        h = self.up1(self.down2(half))
        h = self.up2(self.join1(torch.cat([h, half], dim=1)))
        clean: Tensor = self.leave(self.join2(torch.cat([h, full], dim=1)))
        return clean


@torch.no_grad()
def test_error(model: nn.Module, noisy: Tensor, clean: Tensor) -> float:
    """The root of the mean squared difference of pixels; leaves the model in training mode."""
    model.eval()
    error = F.mse_loss(model(noisy), clean).sqrt().item()
    model.train()
    return error


def main() -> None:
    args = parse_args()
    device = downpour.device()
    digits = digits_data.load()
    clean = digits.test_images.to(device)
    drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(digits_data.SPLIT_SEED))
    noisy = clean + args.noise * drawn.to(device)

    torch.manual_seed(args.seed)
    model = UNet(args.channels).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    loader = DataLoader(TensorDataset(digits.train.tensors[0]), batch_size=args.batch_size, shuffle=True)
    plan = downpour.Plan(split=args.split.split(",") if args.split else None)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader, plan=plan)

    for epoch in range(downpour.epoch(), args.epochs):
        losses: list[float] = []
        for step, (images,) in enumerate(loader):
            target = images.to(device)
            # All workers of a replica have the same random numbers here, so they draw the same noise.
            given = target + args.noise * torch.randn_like(target)
            optimizer.zero_grad()
            loss = downpour.forward_backward(model, F.mse_loss, given, target)
            optimizer.step()

            losses.append(loss.item())
            if step % args.log_every == 0 and downpour.is_chief():
                downpour.log(loss=losses[-1])

        if downpour.is_chief():
            error = test_error(downpour.unsplit(model), noisy, clean)
            mean_loss = sum(losses) / max(1, len(losses))
            print(f"epoch {epoch + 1}  loss {mean_loss:.4f}  test error {error:.4f}")

    if downpour.is_chief():
        error = test_error(downpour.unsplit(model), noisy, clean)
        downpour.log(test_error=error)
        print(f"final test error {error:.4f}  (of the noisy images: {F.mse_loss(noisy, clean).sqrt().item():.4f})")


if __name__ == "__main__":
    main()
