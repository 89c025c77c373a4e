"""Train `emojiworld`, the bundled text-to-image model, from nothing.

    python -m experiments.emojiworld.train      # all stages; writes training/emojiworld/model
    python -m experiments.emojiworld.train --help

Stages, each resumed from its last checkpoint when the command is started again:

    vae       AutoencoderKL on random crops of scenes: L1 + MSE + L1 of the gradients + a little KL
              (Rombach et al. 2022)
    encode    every training scene to a latent, once
    unet      CLIPTextModel and UNet2DConditionModel together on noise prediction; captions are
              dropped one time in ten (Ho & Salimans 2022), the loss is weighted by min-SNR (Hang et
              al. 2023)
    refine    the same once more from there, with a fresh one-cycle rate; for every other picture
              the start, end and padding tokens are hidden: the UNet learns to find each noun at its
              own word
    decoder   the VAE's decoder alone, its latents unchanged, on crops of whole scenes
    export    an ordinary diffusers directory: fp16 safetensors, tokenizer, scheduler, its words

`--start MODEL` takes VAE, text encoder and UNet from a finished model instead of the stages vae and
unet.

Everything is drawn from `--seed`; step k of a stage always sees the same batch, whether or not it
was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from experiments.emojiworld import world

MIN_SNR_GAMMA = 5.0
CAPTION_DROPOUT = 0.1
HIDDEN_ENDS = 0.5  # of the pictures in the refining stage
TOKENS = 77


# --- the components -------------------------------------------------------------------------------


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a CLIP tokenizer that has one token for every word that a caption can contain.

    Its byte-pair merges make these tokens.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=0, end_of_word_suffix="</w>", show_progress=False
    )
    # Each word another number of times: ties would be broken by chance, and another run would
    # number the tokens otherwise.
    bpe.train_from_iterator(
        [word for count, word in enumerate(world.vocabulary(), 1) for _ in range(count)], trainer
    )
    merges = json.loads(bpe.to_str())["model"]["merges"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [
        *alphabet,
        *(piece + "</w>" for piece in alphabet),
        *("".join(pair) for pair in merges),
    ]
    vocab = {
        piece: index
        for index, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n"
    )
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS
    )
    for word in world.vocabulary():
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    return tokenizer


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=world.SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers reads this as the number of heads, as it does for SD 1.x
    )


def build_scheduler() -> DDIMScheduler:
    """Return a scheduler with Stable Diffusion v1's noise levels.

    PNDM, its default, extrapolates, and burns this model's colours at guidance 5.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


# --- one training loop for both stages ------------------------------------------------------------


class Trainer:
    """AdamW with a one-cycle rate, a moving average of the weights, and checkpoints.

    The average is exponential. Checkpoints are replaced whole. Without a `cycle` the rate stays at
    its top once it is warm. `seconds` is the time of all steps so far, see `clock`.
    """

    def __init__(
        self,
        name: str,
        modules: torch.nn.ModuleDict,
        steps: int,
        rate: float,
        folder: Path,
        ema: float,
        cycle: bool = True,
    ):
        self.name, self.modules, self.steps, self.rate, self.decay = name, modules, steps, rate, ema
        self.cycle, self.seconds = cycle, 0.0
        self.path = folder / f"{name}.pt"
        self.average = {
            key: value.detach().clone().float() for key, value in modules.state_dict().items()
        }
        self.optimizer = torch.optim.AdamW(
            modules.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True
        )
        self.step = 0
        if self.path.exists():
            saved = torch.load(
                self.path, weights_only=True, map_location=next(modules.parameters()).device
            )
            modules.load_state_dict(saved["modules"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average, self.step = saved["average"], saved["step"]
            self.seconds = saved.get("seconds", 0.0)

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step: up over the first 5%, then a cosine to 1% of the top rate."""
        warm = max(1, self.steps // 20) if self.cycle else 40
        if step < warm:
            return self.rate * (step + 1) / warm
        if not self.cycle:
            return self.rate
        return self.rate * (
            0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))
        )

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        state = {
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, partial)
        partial.replace(self.path)

    def run(
        self, loss_of: Callable[[int], torch.Tensor], every: int = 250, until: int | None = None
    ) -> None:
        """Train to the last step, or to step `until`.

        `loss_of(step)` draws the batch of that step and returns its loss.
        """
        last = self.steps if until is None else until
        if self.step >= last:
            return
        self.modules.train()
        running: float | None = None
        device = next(self.modules.parameters()).device.type
        began = clock(device) - self.seconds
        with tqdm(total=last, initial=self.step, desc=self.name, mininterval=5) as bar:
            while self.step < last:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate(self.step)
                loss = loss_of(self.step)
                if not math.isfinite(value := float(loss.detach())):
                    raise SystemExit(f"{self.name}: the loss is {value} at step {self.step}")
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
                self.optimizer.step()
                self.step += 1
                decay = min(self.decay, (1 + self.step) / (10 + self.step))
                for key, parameter in self.modules.state_dict().items():
                    self.average[key].lerp_(parameter.float(), 1 - decay)
                running = value if running is None else 0.98 * running + 0.02 * value
                bar.set_postfix(loss=f"{running:.4f}", refresh=False)
                bar.update()
                if self.step % every == 0 or self.step == last:
                    self.seconds = clock(device) - began
                    self.save()

    def averaged(self) -> torch.nn.ModuleDict:
        """Return the modules with the moving average of their weights, ready for use."""
        self.modules.load_state_dict(
            {
                key: value.to(self.modules.state_dict()[key].dtype)
                for key, value in self.average.items()
            }
        )
        return self.modules.eval().requires_grad_(False)


def clock(device: str) -> float:
    """Return seconds: of this process's processor time on a CPU, of the clock on a GPU."""
    if torch.device(device).type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# --- stages ---------------------------------------------------------------------------------------


def draw_training_set(count: int) -> tuple[torch.Tensor, list[str]]:
    """Return `count` scenes as a (count, 3, 128, 128) uint8 tensor, and their captions."""
    images = torch.empty((count, 3, world.SIZE, world.SIZE), dtype=torch.uint8)
    captions = []
    for seed in tqdm(range(count), desc="scenes", mininterval=5):
        scene = world.draw_scene(seed)
        images[seed] = torch.from_numpy(scene.image.copy()).permute(2, 0, 1)
        captions.append(scene.caption)
    return images, captions


def gradient_l1(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of the gradients of two pictures."""
    return (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean() + (
        a.diff(dim=-2) - b.diff(dim=-2)
    ).abs().mean()


def autoencoder_loss(vae: AutoencoderKL, target: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return the loss of a round trip: L1 + MSE + half the L1 of the gradients + a little KL."""
    with torch.autocast(target.device.type, torch.bfloat16):
        posterior = vae.encode(target).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    decoded = decoded.float()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
    return (
        F.l1_loss(decoded, target)
        + F.mse_loss(decoded, target)
        + 0.5 * gradient_l1(decoded, target)
        + 1e-4 * kl
    )


def train_vae(options: argparse.Namespace, images: torch.Tensor) -> AutoencoderKL:
    device, crop, batch = options.device, 64, 16
    vae = build_vae().to(device)
    trainer = Trainer(
        "vae", torch.nn.ModuleDict({"vae": vae}), options.vae_steps, 1.5e-3, options.folder, 0.998
    )

    def loss_of(step: int) -> torch.Tensor:
        draw = generator(options.seed, step)
        which = torch.randint(len(images), (batch,), generator=draw)
        corners = torch.randint(world.SIZE - crop + 1, (batch, 2), generator=draw)
        crops = [
            images[i, :, y : y + crop, x : x + crop]
            for i, (y, x) in zip(which, corners.tolist(), strict=True)
        ]
        target = torch.stack(crops).to(device).float() / 127.5 - 1
        side = crop // 2 ** (len(vae.config.block_out_channels) - 1)
        noise = torch.randn((batch, vae.config.latent_channels, side, side), generator=draw)
        return autoencoder_loss(vae, target, noise.to(device))

    trainer.run(loss_of)
    return trainer.averaged()["vae"]  # type: ignore[return-value]


@torch.no_grad()
def encode(
    options: argparse.Namespace, vae: AutoencoderKL, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of every scene's latent, each (count, 4, 16, 16).

    The VAE is centred first. The channel means of the latents are folded into its 1x1 convolutions,
    and its scaling factor is set to one over their standard deviation. So the latents that the UNet
    meets have mean 0 and standard deviation 1.
    """
    path = options.folder / "latents.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        mean, std, centre = saved["mean"], saved["std"], saved["centre"]
    else:
        means, stds = [], []
        for start in tqdm(range(0, len(images), 64), desc="encode", mininterval=5):
            pixels = images[start : start + 64].to(options.device).float() / 127.5 - 1
            with torch.autocast(torch.device(options.device).type, torch.bfloat16):
                posterior = vae.encode(pixels).latent_dist
            means.append(posterior.mean.float().cpu())
            stds.append(posterior.std.float().cpu())
        mean, std = torch.cat(means), torch.cat(stds)
        centre = mean.mean(dim=(0, 2, 3)) if options.start is None else torch.zeros(mean.shape[1])
        mean = mean - centre[None, :, None, None]
        torch.save({"mean": mean, "std": std, "centre": centre}, path)
    if options.start is not None:  # it was centred when it was made
        return mean, std
    centre = centre.to(options.device)
    vae.quant_conv.bias[: len(centre)] -= centre
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ centre
    vae.register_to_config(scaling_factor=round(float(1 / mean.std()), 4))
    return mean, std


def train_unet(
    options: argparse.Namespace,
    name: str,
    modules: torch.nn.ModuleDict,
    scale: float,
    tokenizer: CLIPTokenizer,
    latents: tuple[torch.Tensor, torch.Tensor],
    captions: list[str],
) -> torch.nn.ModuleDict:
    """Train text encoder and UNet for one cycle; `refine` hides the ends of half the captions."""
    device, batch, refining = options.device, 32, name == "refine"
    steps, rate, decay = (
        (options.refine_steps, 6e-4, 0.9995) if refining else (options.unet_steps, 1e-3, 0.999)
    )
    modules.to(device)
    unet, text_encoder = modules["unet"], modules["text_encoder"]
    # Of attention's three ways, the plain one is by far the fastest to train on these small grids.
    unet.set_default_attn_processor()
    text_encoder.set_attn_implementation("eager")
    trainer = Trainer(name, modules, steps, rate, options.folder, decay)
    mean, std = (part * scale for part in latents)
    ids = tokenizer(
        [*captions, ""], padding="max_length", max_length=TOKENS, return_tensors="pt"
    ).input_ids
    inside = (ids != tokenizer.bos_token_id) & (
        ids != tokenizer.eos_token_id
    )  # CLIP pads with its end token
    scheduler = build_scheduler()
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weight = (snr.clamp(max=MIN_SNR_GAMMA) / snr).to(device)

    def loss_of(step: int) -> torch.Tensor:
        draw = generator(options.seed + (2 if refining else 1), step)
        which = torch.randint(len(mean), (batch,), generator=draw)
        latent = (
            mean[which] + std[which] * torch.randn((batch, *mean.shape[1:]), generator=draw)
        ).to(device)
        noise = torch.randn(latent.shape, generator=draw).to(device)
        t = torch.randint(1000, (batch,), generator=draw).to(device)
        dropped = torch.rand(batch, generator=draw) < CAPTION_DROPOUT
        which = torch.where(dropped, len(captions), which)
        seen = None
        if refining:
            hidden = (torch.rand(batch, generator=draw) < HIDDEN_ENDS) & ~dropped
            seen = (inside[which] | ~hidden[:, None]).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            noisy = scheduler.add_noise(latent, noise, t)
            prediction = unet(
                noisy,
                t,
                text_encoder(ids[which].to(device)).last_hidden_state,
                encoder_attention_mask=seen,
            ).sample
        error = (prediction.float() - noise).square().mean(dim=(1, 2, 3))
        return (weight[t] * error).mean()

    trainer.run(loss_of)
    return trainer.averaged()


def train_decoder(
    options: argparse.Namespace,
    vae: AutoencoderKL,
    latents: tuple[torch.Tensor, torch.Tensor],
    images: torch.Tensor,
) -> AutoencoderKL:
    """Fit the decoder to the encoder's latents, which no longer change.

    It becomes sharper than while the two moved together.
    """
    device, crop, batch = options.device, 64, 16
    mean, std = latents
    vae_f = world.SIZE // mean.shape[-1]
    side = crop // vae_f
    vae = vae.to(device)
    decoder = torch.nn.ModuleDict(
        {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    ).requires_grad_(True)
    trainer = Trainer("decoder", decoder, options.decoder_steps, 8e-4, options.folder, 0.998)

    def loss_of(step: int) -> torch.Tensor:
        draw = generator(options.seed + 3, step)
        which = torch.randint(len(images), (batch,), generator=draw)
        corners = torch.randint(
            (world.SIZE - crop) // vae_f + 1, (batch, 2), generator=draw
        ).tolist()
        noise = torch.randn((batch, mean.shape[1], side, side), generator=draw)
        parts = [(slice(y, y + side), slice(x, x + side)) for y, x in corners]
        latent = torch.stack(
            [
                mean[i][:, y, x] + std[i][:, y, x] * n
                for i, n, (y, x) in zip(which, noise, parts, strict=True)
            ]
        )
        crops = [
            images[i, :, y * vae_f : y * vae_f + crop, x * vae_f : x * vae_f + crop]
            for i, (y, x) in zip(which, corners, strict=True)
        ]
        target = torch.stack(crops).to(device).float() / 127.5 - 1
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            decoded = vae.decode(latent.to(device)).sample.float()
        return (
            F.l1_loss(decoded, target)
            + 2 * F.mse_loss(decoded, target)
            + 0.5 * gradient_l1(decoded, target)
        )

    trainer.run(loss_of)
    trainer.averaged()
    return vae


def export(
    options: argparse.Namespace,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    modules: torch.nn.ModuleDict,
) -> Path:
    """Write the diffusers directory and return its path."""
    target: Path = options.folder / "model"
    pipeline = StableDiffusionPipeline(
        vae=vae.cpu().half(),
        text_encoder=modules["text_encoder"].cpu().half(),
        tokenizer=tokenizer,
        unet=modules["unet"].cpu().half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(target, safe_serialization=True)
    for config in target.glob(
        "*/config.json"
    ):  # where the weights came from is a place of this machine
        kept = {
            name: value
            for name, value in json.loads(config.read_text()).items()
            if name != "_name_or_path"
        }
        config.write_text(json.dumps(kept, indent=2) + "\n")
    (target / "words.json").write_text(json.dumps(world.vocabulary(), indent=0) + "\n")
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"wrote {target} ({size / 1e6:.1f} MB)")
    return target


@contextlib.contextmanager
def timed(stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{stage}: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("training/emojiworld"),
        help="checkpoints, and the model at the end",
    )
    parser.add_argument("--start", type=Path, help="a finished model to refine")
    parser.add_argument("--scenes", type=int, default=40_000, help="scenes in the training set")
    parser.add_argument("--vae-steps", type=int, default=5000)
    parser.add_argument("--unet-steps", type=int, default=4500)
    parser.add_argument("--refine-steps", type=int, default=7000)
    parser.add_argument("--decoder-steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: list[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    np.random.seed(options.seed)
    if options.start is not None:
        tokenizer = CLIPTokenizer.from_pretrained(options.start / "tokenizer")
    else:
        tokenizer = build_tokenizer(options.folder / "tokenizer")
    with timed("scenes"):
        images, captions = draw_training_set(options.scenes)
    if options.start is not None:
        vae = (
            AutoencoderKL.from_pretrained(options.start, subfolder="vae", torch_dtype=torch.float32)
            .to(options.device)
            .eval()
        )
    else:
        with timed("vae"):
            vae = train_vae(options, images)
    with timed("encode"), torch.no_grad():
        latents = encode(options, vae, images)
    scale = float(vae.config.scaling_factor)
    if options.start is not None:
        modules = torch.nn.ModuleDict(
            {
                "unet": UNet2DConditionModel.from_pretrained(
                    options.start, subfolder="unet", torch_dtype=torch.float32
                ),
                "text_encoder": CLIPTextModel.from_pretrained(
                    options.start / "text_encoder", dtype=torch.float32
                ),
            }
        )
    else:
        modules = torch.nn.ModuleDict(
            {"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}
        )
        with timed("unet"):
            modules = train_unet(options, "unet", modules, scale, tokenizer, latents, captions)
    with timed("refine"):
        modules = train_unet(
            options, "refine", modules.requires_grad_(True), scale, tokenizer, latents, captions
        )
    with timed("decoder"):
        vae = train_decoder(options, vae, latents, images)
    export(options, vae, tokenizer, modules)


if __name__ == "__main__":
    main()
