# %% [markdown]
# # A deep dive into Stable Diffusion
#
# You know the one line: `pipe("An astronaut scuba diving").images`. A sentence goes in, a picture
# comes out. This lesson opens the box. It tells in order what happens between the two, and shows
# each thing on a real model: `emojiworld`, which comes with this toolkit. It has the parts and the
# code path of Stable Diffusion v1, and is small enough for a laptop.
#
#     python -m experiments.deep_dive        # the pictures go to runs/deep_dive; see --help
#
# Or open this file as cells (VS Code, Spyder, or `jupytext --to notebook`) and run them one by one;
# the pictures then appear below their cells. No result is written into the text. Each is computed
# when you run it, so change what you like and look.

# %%
import argparse
import builtins
import copy
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from torch.nn.functional import cosine_similarity, mse_loss

import probe
from experiments.drawing import (
    BLUE,
    RED,
    Cost,
    Line,
    Row,
    Scale,
    areas,
    chart,
    sheet,
    signed,
    table,
)
from probe.analysis.maps import word_maps
from probe.conversions import denoised_from
from probe.diffusion.draws import noise
from probe.diffusion.guidance import guide
from probe.diffusion.loading import BUNDLED, blueprint, load
from probe.diffusion.sampling import denoise
from probe.diffusion.variants import unet_at
from probe.reading.pixels import WHY_THEY_DIFFER
from probe.reading.pixels import paper as published
from probe.reading.pixels import trained as demonstration
from probe.settings.cost import load_cost
from probe.watching.counting import Counter

NOTEBOOK = hasattr(builtins, "get_ipython")
parser = argparse.ArgumentParser(
    description="What happens inside Stable Diffusion, told with the bundled model.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
folder = Path("runs/deep_dive")
parser.add_argument("--out", type=Path, default=folder, help="folder for the pictures")
parser.add_argument(
    "--steps", type=int, default=30, choices=range(6, 101), metavar="6..100", help="denoising steps"
)
parser.add_argument(
    "--noises",
    type=int,
    default=16,
    choices=range(2, 65),
    metavar="2..64",
    help="noises a timestep",
)
parser.add_argument(
    "--html",
    type=Path,
    metavar="FOLDER",
    help="write the recordings as pages that play in a browser, with this text, into a folder",
)
options = parser.parse_args([] if NOTEBOOK else None)
OUT, STEPS, NOISES = options.out, options.steps, options.noises
PROMPT, SEED, GUIDANCE = "An astronaut scuba diving", 5, 3.0
OUT.mkdir(parents=True, exist_ok=True)


def show(name, picture):
    """Save a picture into the folder; in a notebook, put it below the cell as well."""
    picture.save(OUT / f"{name}.png")
    if NOTEBOOK:
        builtins.display(picture)
    else:
        print(f"  -> {OUT / name}.png")


# %% [markdown]
# ## 1. One line
#
# This is all that most people ever see. (The arguments are the same as for Stable Diffusion; the
# safety checker is left out, as there is nothing to check for in a world of emoji.) In its training
# the model saw astronauts, and it saw scuba diving, but never both at once. It has to put them
# together.

# %%
pipe = StableDiffusionPipeline.from_pretrained(
    BUNDLED["emojiworld"], safety_checker=None, requires_safety_checker=False
)
pipe.to(torch.float32)
pipe.set_progress_bar_config(disable=True)
ask = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
one_line = pipe(PROMPT, **ask, generator=torch.Generator().manual_seed(SEED)).images[0]

print(f"{PROMPT!r}: a picture of {one_line.width} x {one_line.height} pixels, from one line.")
note = f"{STEPS} steps, guidance {GUIDANCE:g}, seed {SEED}"
show("1-one-line", sheet(PROMPT, note, [""], [Row("", [one_line])], cell=384))

# %% [markdown]
# ## 2. By hand
#
# Behind the line are two halves. A **text understander** reads the sentence and turns it into
# numbers. An **image generator** makes a picture of these numbers. It has two parts itself: an
# *image information creator*, which works over many steps on a small array of numbers called
# **latents**, and a **decoder**, which paints the picture, once, at the end.
#
# Here each is called by hand. `denoise` is the loop of the image information creator; it hands out
# every step, and we keep them all to look at later.

# %%
model = load("emojiworld", dtype="float32", device="cpu")
conditioning = model.condition(PROMPT)  # the text understander
# the image information creator
steps = list(denoise(model, conditioning, steps=STEPS, guidance_scale=GUIDANCE, seed=SEED))
latents = steps[-1].next_latents
by_hand = model.decode(latents)[0]  # the decoder

generator = torch.Generator().manual_seed(SEED)
same_latents = pipe(PROMPT, **ask, generator=generator, output_type="latent").images
same_picture = torch.from_numpy(np.array(one_line))
assert torch.equal(latents, same_latents), "by hand came to other latents than the one line"
assert torch.equal(by_hand[0], same_picture), "by hand came to another picture than the one line"
print(f"{len(steps)} calls of the UNet, {latents.numel()} latents, {by_hand.numel()} pixel values:")
print("by hand and by one line agree in every bit.")

# %% [markdown]
# So nothing is hidden from us. Whatever we look at from here on *is* what the one line does, not
# something like it.
#
# ## 3. Three components and their shapes
#
# *Text encoder*, *UNet with its scheduler*, *VAE*. To know what is special to our small model and
# what is common to the family, we put Stable Diffusion v1 beside it: its own configuration on the
# "meta" device, where tensors have a shape and no content. That takes no weights.

# %%
published_model = blueprint("sd14")
sd1 = {
    "text encoder": published_model.text_encoder,
    "UNet": published_model.unet,
    "VAE": published_model.vae,
}
ours = {"text encoder": model.text_encoder, "UNet": model.unet, "VAE": model.vae}


@torch.no_grad()
def follow(text_encoder, unet, vae, ids):
    """Send ids through the three components, and say what comes out of each."""
    embeddings = text_encoder(ids)[0]
    side = unet.config.sample_size
    x = torch.zeros(1, unet.config.in_channels, side, side, device=ids.device)
    eps = unet(x, torch.tensor(500, device=ids.device), encoder_hidden_states=embeddings).sample
    pixels = vae.decode(x).sample
    outputs = {
        "tokenizer: ids": ids,
        "text encoder: embeddings": embeddings,
        "UNet, in: latents": x,
        "UNet, out: predicted noise": eps,
        "VAE decoder: picture": pixels,
        "VAE encoder: latents again": vae.encode(pixels).latent_dist.mean,
    }
    return {name: " x ".join(map(str, tensor.shape[1:])) for name, tensor in outputs.items()}


def millions(module):
    return f"{sum(weights.numel() for weights in module.parameters()) / 1e6:.1f} million"


here = follow(*ours.values(), conditioning.cond.ids)
there = follow(*sd1.values(), conditioning.cond.ids.to("meta"))
models = ["emojiworld", "Stable Diffusion v1"]
print(table(["what comes out", *models], [(name, here[name], there[name]) for name in here]), "\n")
counts = [(name, millions(ours[name]), millions(sd1[name])) for name in ours]
print(table(["parameters", *models], counts))

# %% [markdown]
# ### Text: words, tokens, ids, vectors
#
# The **tokenizer** cuts the sentence into pieces that it knows, and gives each piece its number. It
# puts a start token in front and an end token behind, and repeats the end until the row is full:
# the model always reads a row of the same length.
#
# The **text encoder** turns each id into a vector, and lets each vector look at those before it. So
# a vector stands for a token *in its sentence*: at the same place, the same word after other words
# keeps its id and gets another vector.

# %%
read = conditioning.cond
first = range(read.end + 2)  # the start, the words, the end, and one of the repeats
words = [read.words[number] if number >= 0 else "" for number in read.word_of]
rows = [(i, read.tokens[i], int(read.ids[0, i]), words[i]) for i in first]
print(table(["position", "token", "id", "word"], rows))
more, last = len(read.tokens) - len(first), len(read.tokens) - 1
print(f"  ... and {more} more like the last, to position {last}")

place = read.end - 1
other = model.read(f"a picture of {words[place]}")
as_long = (
    "change this sentence: it must be as long as the prompt, to have the word at the same place"
)
assert other.end == read.end, as_long
assert other.ids[0, place] == read.ids[0, place]
vector, another = conditioning.cond_embedding[0, place], model.encode(other)[0, place]
alike = float(cosine_similarity(vector, another, dim=0))
print(f"{words[place]!r} in {read.text!r} and in {other.text!r}:")
print(f"the same id, and vectors of cosine {alike:.2f}.")

vectors = conditioning.cond_embedding[0, : read.end + 2]
colours = signed(float(vectors.abs().quantile(0.99)))
pictures = [colours(vector.reshape(8, -1)) for vector in vectors]
label = f"{vectors.shape[1]} numbers a\ntoken, folded\ninto {len(pictures[0])} rows"
note = "the text encoder's output, the only thing that the UNet ever learns of the sentence"
tokens = [read.tokens[i] for i in first]
rows = [Row(label, pictures, scale=colours)]
show("3-embeddings", sheet("One vector for each token", note, tokens, rows))

# %% [markdown]
# ### VAE: pixels to latents and back
#
# The **encoder** squeezes a picture into latents; the **decoder** paints a picture from latents.
# Something is lost. How much, the PSNR tells (peak signal-to-noise ratio, in decibels; more is
# better). We try the picture that was just made, which is easy, as this decoder painted it; and a
# drawing from outside of the model's world, with fine lines.


# %%
def encode(picture):
    """Return a picture's latents, scaled as the UNet knows them: (1, channel, y, x)."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        return model.vae.encode(pixels).latent_dist.mean * model.scaling_factor


def paint(some_latents):
    """Return the decoder's pictures of latents: (image, y, x, rgb) uint8."""
    return model.decode(some_latents)[0].numpy()


def psnr(picture, other):
    error = np.square(np.array(picture, np.float32) - np.array(other, np.float32)).mean()
    return float(10 * np.log10(255**2 / error))


stranger = Image.new("RGB", one_line.size, (214, 234, 248))
pen = ImageDraw.Draw(stranger)
pen.rectangle((0, 92, 128, 128), (120, 170, 90))
pen.polygon([(30, 62), (64, 34), (98, 62)], (176, 58, 46))
pen.rectangle((38, 62, 90, 106), (245, 222, 179))
for offset in range(0, 52, 4):
    pen.line([(38 + offset, 62), (38 + offset, 106)], (160, 120, 80))

three, loss_colours = signed(3), Scale(0, 0.25, form="{:.0%}")
rows, score = [], {}
for label, picture in {
    "the picture\njust made": one_line,
    "a drawing from\noutside its world": stranger,
}.items():
    squeezed = encode(picture)
    back = paint(squeezed)[0]
    score[label] = psnr(picture, back)
    lost = np.abs(np.array(picture, np.float32) - back).mean(-1) / 255
    spread = [f"std {channel.std():.2f}" for channel in squeezed[0]]
    pictures = [picture, *map(three, squeezed[0]), back, loss_colours(lost)]
    captions = ["", *spread, f"{score[label]:.1f} dB", f"mean {lost.mean():.1%}"]
    rows.append(Row(label, pictures, captions, loss_colours))
channels = [f"latents, channel {index}" for index in range(len(latents[0]))]
heads = ["picture", *channels, "back again", "what was lost"]
note = f"latents from {three.least:g} (blue) over white to {three.greatest:g} (red); "
note += "what was lost as a share of full brightness, scale on the right"
show("3-round-trip", sheet("Through the VAE and back", note, heads, rows))

pixels = one_line.width * one_line.height * 3
fewer = pixels / latents.numel()
print(f"{pixels} numbers become {latents.numel()}: {fewer:.0f} times fewer.")
print(f"f = {model.f} pixels a latent along each side.")
for label, value in score.items():
    print(f"round trip of {' '.join(label.split())}: {value:.1f} dB")

# %% [markdown]
# ## 4. How diffusion works
#
# ### Forward: ruin a picture, knowingly
#
# Take a picture, as latents $x_0$. Draw noise $\varepsilon$. Choose a timestep $t$, and mix them:
#
# $$x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\; \varepsilon$$
#
# The schedule $\bar\alpha_t$ falls from nearly one (all picture) to nearly nought (all noise). This
# costs nothing, works with any picture, noise and timestep, and **we know the answer**, since we
# drew the noise ourselves. So there are as many exercises as one likes: here is $x_t$; which noise
# is in it?
#
# Below, the UNet answers. What it takes for noise is held against what was added. Shown as well is
# the picture that would remain if it were right: the more noise, the less there is to go by, and
# the vaguer it gets.

# %%
alpha_bar = model.scheduler.alphas_cumprod  # one number for each timestep of the training
x0 = encode(one_line)
eps = noise(SEED + 1, tuple(x0.shape), x0.dtype)[0]
text = conditioning.cond_embedding


@torch.no_grad()
def predict_noise(x, t):
    return model.unet(x, t, encoder_hidden_states=text.expand(len(x), -1, -1)).sample


T = [20, 100, 250, 450, 650, 850, 990]
noisy, answers, remains = [], [], []
for t in T:
    x = alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * eps
    assert torch.allclose(x, model.scheduler.add_noise(x0, eps, torch.tensor([t])), atol=1e-6), (
        "the formula is not what the scheduler does"
    )
    noisy.append(x)
    answers.append(predict_noise(x, t))
    remains.append(denoised_from(answers[-1], x, float(alpha_bar[t]), model.prediction_type))

remaining = paint(torch.cat(remains))
rows = [
    Row(
        "picture and noise,\ndecoded",
        paint(torch.cat(noisy)),
        [f"{alpha_bar[t].sqrt():.0%} + {(1 - alpha_bar[t]).sqrt():.0%} noise" for t in T],
    ),
    Row("the noise that\nwas added\n(channel 0)", [three(eps[0, 0])] * len(T), scale=three),
    Row("what the UNet\ntakes for noise", [three(answer[0, 0]) for answer in answers], scale=three),
    Row(
        "its mistake",
        [three((answer - eps)[0, 0]) for answer in answers],
        [f"loss {mse_loss(answer, eps):.3f}" for answer in answers],
        three,
    ),
    Row(
        "what remains,\ndecoded",
        remaining,
        [f"{psnr(picture, one_line):.1f} dB" for picture in remaining],
    ),
]
note = "and what the UNet makes of it in a single call; loss: mean squared error of all channels"
show(
    "4-forward",
    sheet("Forward: the same noise in growing amounts", note, [f"t = {t}" for t in T], rows),
)

# %% [markdown]
# ### Training: get better at exactly this
#
# The **loss** is the mean squared distance between the noise that was added and the noise that was
# predicted. Training draws a picture, a timestep and a noise, computes the loss, moves each weight
# a little to where the loss falls, and begins again, very often. That is the whole objective:
#
# $$L = \mathbb{E}_{x_0,t,\varepsilon} \|\varepsilon - \varepsilon_\theta(x_t, t, \text{text})\|^2$$
#
# How large is it? That depends on $t$, and for each $t$ on the noise one happens to draw, so we
# draw several. Beside it stands a lazy student, who calls the whole of the input noise. Where there
# is hardly anything but noise he is right: a low loss there means little.

# %%
times = [10, 40, 80, *range(150, 1000, 120), 999]
draws = noise(SEED + 2, (NOISES, *x0.shape[1:]), x0.dtype)[0]  # each from a seed of its own
losses, lazy = [], []
for t in times:
    x = alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * draws
    losses.append((predict_noise(x, t) - draws).square().mean((1, 2, 3)).numpy())
    lazy.append((x - draws).square().mean((1, 2, 3)).numpy())
losses, lazy = np.array(losses), np.array(lazy)  # (timestep, noise)

columns = losses.mean(1), losses.std(1, ddof=1), lazy.mean(1)
rows = [(t, *(f"{column[i]:.4f}" for column in columns)) for i, t in enumerate(times)]
print(table(["timestep", "loss, mean", "spread (std)", "lazy student"], rows))
note = f"line: mean over {NOISES} noises; band: from the least to the greatest; one picture"
lines = [Line("UNet", BLUE, losses), Line("lazy student", RED, lazy)]
axes = "timestep t (more noise to the right)", "loss: mean squared error"
show("4-loss", chart("How wrong is the predicted noise?", note, *axes, times, lines))

# %% [markdown]
# And here is one step of training, on a copy of the UNet: one exercise, its loss, the slope, a
# small move of every weight downhill.

# %%
student, t = copy.deepcopy(model.unet), T[3]
exercise = {"sample": noisy[3], "timestep": t, "encoder_hidden_states": text}
loss = mse_loss(student(**exercise).sample, eps)
loss.backward()
with torch.no_grad():
    learning = [weights for weights in student.parameters() if weights.grad is not None]
    # so that the loss falls by about a hundredth
    rate = 0.01 * loss / sum(weights.grad.square().sum() for weights in learning)
    for weights in learning:
        weights -= rate * weights.grad
    after = mse_loss(student(**exercise).sample, eps)
print(f"one step at t = {t}: loss {loss:.5f} -> {after:.5f} ({after / loss - 1:+.2%}).")
print("Very many of these made the model.")

# %% [markdown]
# ### Backward: out of nothing but noise
#
# Now the other way. Begin with pure noise, pretend that a picture is in it, and ask the UNet which
# part is noise. It cannot know, so it gives its best guess. By squared error the best guess is a
# mean: at first of all pictures that the words allow, which is a blur. The **scheduler** takes a
# little of the noise away, and we ask again. With every step fewer pictures are left.
#
# Each question is asked twice: with your prompt (*cond*) and with an empty one (*uncond*). The
# difference is what the words add, and **guidance** exaggerates it $s$ times: $\varepsilon =
# \varepsilon_u + s\,(\varepsilon_c - \varepsilon_u)$.
#
# The whole loop, written out:

# %%
scheduler = copy.deepcopy(model.scheduler)
scheduler.set_timesteps(STEPS)
x = noise(SEED, tuple(x0.shape), x0.dtype)[0] * scheduler.init_noise_sigma
both = torch.cat([conditioning.uncond_embedding, conditioning.cond_embedding])
for t in scheduler.timesteps:
    with torch.no_grad():
        twice = torch.cat([x, x])
        eps_uncond, eps_cond = model.unet(twice, t, encoder_hidden_states=both).sample.chunk(2)
    x = scheduler.step(eps_uncond + GUIDANCE * (eps_cond - eps_uncond), t, x).prev_sample

assert torch.equal(x, latents), "the loop written out came to other latents"
print(f"the loop written out, with {type(scheduler).__name__}: the same bits again,")
print(f"after {len(scheduler.timesteps)} calls.")

# %% [markdown]
# Look at it from left to right. "Believed" is the picture that remains if all predicted noise is
# taken away at once. Without words the model believes in some picture of its world; the words
# pull; guidance pulls harder. How far they move the believed latents $x_0$ (by $\sigma$ times the
# change in the noise) is written below. Watch it shrink.

# %%
indices = np.unique(np.linspace(0, len(steps) - 1, 8).round().astype(int))
chosen = [steps[index] for index in indices]
for step in steps:
    guided = guide(step.prediction_uncond, step.prediction_cond, GUIDANCE)
    assert torch.equal(step.prediction, guided), "guidance is not what it is said to be"


def believed(name):
    """Return the pictures that remain at the chosen steps if all of a prediction is taken away."""
    remaining = []
    for step in chosen:
        prediction, x, kind = getattr(step, name), step.model_input, step.prediction_type
        remaining.append(denoised_from(prediction, x, step.alpha_bar, kind))
    return paint(torch.cat(remaining))


added = [
    (step.prediction_cond - step.prediction_uncond)[0].square().mean(0).sqrt().numpy()
    for step in chosen
]
pull = Scale(0, float(np.max(added)))
moved = [
    f"moves x0 by {step.sigma * change.mean():.3f}"
    for step, change in zip(chosen, added, strict=True)
]
rows = [
    Row(
        "what goes in,\ndecoded",
        paint(torch.cat([step.latents for step in chosen])),
        [f"t {s.timestep:.0f}, sigma {s.sigma:.2f}" for s in chosen],
    ),
    Row(
        "what is taken for\nnoise, guided\n(channel 0)",
        [three(step.eps[0, 0]) for step in chosen],
        scale=three,
    ),
    Row("believed without\nwords (uncond)", believed("prediction_uncond")),
    Row("believed with\nwords (cond)", believed("prediction_cond")),
    Row("where the words\nchange the noise", [pull(change) for change in added], moved, pull),
    Row(f"believed, guided:\n{GUIDANCE:g} times the\ndifference", believed("prediction")),
]
note = "the words' change: root mean square over channels of cond - uncond"
heads = [f"step {step.index}" for step in chosen]
show("4-backward", sheet("Backward: from noise to a picture", note, heads, rows))

# %% [markdown]
# ### How the words get in
#
# Inside of the UNet each place of the latents asks every token "do you concern me?", and takes up
# what the tokens have to say, in proportion to the answers. That is **cross-attention**, and it can
# be watched: `probe.record` runs the same once more and writes everything down. Watching changes
# nothing; this is checked here, too.
#
# Start, end and padding get their share as well. Mind what such a map is: where the model *looked*.
# That may be the thing that the word names, and it need not be. And mind whose it is: `emojiworld`
# was **trained to bind nouns to words**. Half of its last training hid start, end and padding. Do
# not expect its maps, or its shares, of a model that was not trained like this.

# %%
experiment = {
    "name": "deep-dive",
    "prompt": PROMPT,
    "seed": SEED,
    "steps": STEPS,
    "guidance_scale": GUIDANCE,
    "dtype": "float32",
    "device": "cpu",
    "output": str(OUT),
}
run = probe.record(experiment, progress=False)
same = np.array_equal(run.variable("latents/final_latents").values, latents.numpy())
assert same, "recording changed the picture"
print(f"recorded: {run.path}")

# (step, token, y, x): each token's share of each place's attention, mean over heads, then layers
overview = run.overview()
labels = run.tree[f"attention/{run.grids[0]}"].dataset.isel(branch=-1)
share, number = overview.mean(("step", "y", "x")).values, labels["word_index"].values
ends = share[number < 0][1:].sum()
print(f"of all attention, {share[0]:.0%} goes to the start token,")
print(f"{share[number >= 0].sum():.0%} to words, {ends:.0%} to the end and the padding,")
print("in a model that was trained to bind nouns to words.")

maps = word_maps(overview, labels["word"].values, number)  # (step, word, y, x)
thirds = np.array_split(np.arange(maps.sizes["step"]), 3)
spans = {
    "first third of steps": thirds[0],
    "second": thirds[1],
    "last": thirds[2],
    "all steps": np.arange(maps.sizes["step"]),
}
rows = []
for index, word in enumerate(maps["word"].values):
    means = [maps.isel(word=index, step=span).mean("step").values for span in spans.values()]
    colours = Scale(float(np.min(means)), float(np.max(means)), form="{:.1%}")
    pictures = [colours.over(one_line, mean) for mean in means]
    rows.append(Row(str(word), pictures, [f"mean {mean.mean():.1%}" for mean in means], colours))
note = "a word's share of each place's attention, in a model trained to bind nouns to words; "
note += "mean over heads, then layers; one scale a word"
title = "Where the picture looked at each word"
show("4-attention", sheet(title, note, list(spans), rows, cell=160))

# %% [markdown]
# ## 5. Why latents
#
# All of this would work on pixels, too: give the UNet three colours instead of latent channels, and
# let it run. It is only slow. The idea of Stable Diffusion (Rombach et al. 2022) is to squeeze
# first, to diffuse what was squeezed, and to paint once at the end.
#
# How slow? We count the floating-point operations of one call of the *same* UNet, on latents and
# on pixels. The meta device does it, so nothing is estimated and nothing has to run. Convolutions
# grow with the number of places. Attention, in which every place of a layer looks at every other,
# grows with its *square*.
#
# Nobody has to pay all of that: a model for pixels can do with attention on coarse grids
# (Ho et al. 2020). So a third UNet is counted: the same on pixels, without attention on grids wider
# than the widest that Stable Diffusion v1 has on latents. Beside both stands how many times as many
# places there are. The factors differ because the same UNet pays the square on its widest grids,
# where the third UNet has no attention layer at all.


# %%
WIDEST = sd1["UNet"].config.sample_size


def operations(layers):
    """Return the FLOPs of these layers, attention's share of them, and its largest matrix."""
    total = sum(layer.flops for layer in layers)
    attention = sum(layer.flops for layer in layers if layer.kind.endswith("attention"))
    assert 0 < attention < total, "the counter does not see attention"
    return total, attention / total, max(layer.matrix for layer in layers)


rows, costs = [], []
for name, known in (("emojiworld", "emojiworld"), ("Stable Diffusion v1", "sd14")):
    counter = Counter(blueprint(known), load_cost({"model": known, "attention_up_to": WIDEST}))
    f, side = counter.model.f, counter.model.unet.config.sample_size
    on_latents, on_pixels = (counter.shape(space, (side * f, side * f)) for space in (f, 1))
    cheap = operations(counter.unet(f, on_latents))
    dear = operations(counter.unet(1, on_pixels))
    fair = operations(counter.unet(1, on_pixels, "coarse"))
    times = [f"{total / cheap[0]:.0f}" for total, *_ in (cheap, dear, fair)]
    sizes = f"{cheap[0] / 1e9:,.1f} against {dear[0] / 1e9:,.1f} GFLOP"
    beside = f"{times[2]} times with attention only up to {WIDEST} x {WIDEST}"
    note = f"{sizes}\n{beside}; {f**2} times the places"
    costs.append(Cost(f"{name}: {times[1]} times", note, cheap[0], dear[0], dear[1]))
    kinds = (
        ("latents", on_latents, cheap, times[0], 1),
        ("pixels", on_pixels, dear, times[1], f**2),
        ("pixels**", on_pixels, fair, times[2], f**2),
    )
    for kind, shape, (total, part, matrix), often, places in kinds:
        size = f"{math.prod(shape) * 4 / 1e3:,.0f} kB"
        figures = (f"{matrix * 4 / 1e9:,.3f} GB", f"{total / 1e9:,.1f}", f"{part:.0%}")
        rows.append((name, kind, " x ".join(map(str, shape)), size, *figures, often, places))
heads = ["model", "on", "input", "its size", "scores*", "GFLOP a call", "attention"]
print(table([*heads, "times", "places, times"], rows))
print("  * of one self-attention layer of its finest grid (heads x places x places),")
print("    if they were all kept at once")
print(f"  ** the same UNet, with attention only on grids of at most {WIDEST} x {WIDEST}")
least, most = published().speed_up
print(f"The paper measured {least:.1f} to {most:.1f} times, in time and at a smaller f.")
print(WHY_THEY_DIFFER)
title = "The cost of one call of the same UNet, as area"
parts = "on latents", "on pixels: attention", "on pixels: the rest"
show("5-cost", areas(title, *parts, costs))

# %% [markdown]
# Counted is not measured, so we let the small one run for once: on latents, and on pixels, with
# weights drawn at random. Then a whole picture: all calls, with and without words, and for
# latents the painting on top.


# %%
@torch.no_grad()
def seconds(call, repeats):
    """Return the processor time of a call, which other programs hardly lengthen."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


side = one_line.width
own = {name: value for name, value in model.unet.config.items() if not name.startswith("_")}
on_pixels = UNet2DConditionModel(**own | unet_at(model.unet, 1)).eval()
fast = seconds(lambda: model.unet(x0, 500, encoder_hidden_states=text), 7)
slow = seconds(lambda: on_pixels(torch.zeros(1, 3, side, side), 500, encoder_hidden_states=text), 1)
painting, calls = seconds(lambda: model.decode(latents), 3), 2 * len(steps)
in_all, more = calls * fast + painting, costs[0].large / costs[0].small
print(f"one call of the same UNet on pixels has {more:.0f} times the operations of one on latents")
print(f"({costs[0].note.splitlines()[1]}), and takes {slow / fast:.0f} times the processor time.")
print(f"A whole picture takes {calls * slow / in_all:.0f} times the processor time on pixels:")
print(f"{calls} calls of that UNet, against as many on latents and the decoder's painting,")
print(f"which takes {painting / in_all:.1%} of the processor time of the picture on latents.")
easy, hard = score.values()
print(f"The price: a round trip of {easy:.1f} dB for what the decoder can paint,")
print(f"and {hard:.1f} dB for what it never saw.")

# %% [markdown]
# Cheaper, but is it as good? Only training tells. One UNet was trained on pixels and on latents, on
# small pictures of emoji; `python -m experiments.pixels.train` does it again. Another network says
# in how many pictures it finds what was asked for. KID says how far they are from fresh scenes. The
# ceiling is what the autoencoder's round trip alone has: there is nothing to compare at it. With
# one seed, nobody knows how another training would have ended.


# %%
def share(score):
    """Return a share and its interval as text."""
    return "{:.0%} ({:.0%} to {:.0%})".format(*score)


def trained_rows(trained):
    """Return a row for each denoiser, at its last step. Autoencoders are charged."""
    coders = {one["f"]: one for one in trained["autoencoders"]}
    for denoiser in trained["runs"]:
        f, last, grid = denoiser["f"], denoiser["points"][-1], denoiser["grid"]
        spent = last["seconds"] + coders[f].get("seconds", 0)
        space = f"{denoiser['channels']} x {grid} x {grid}"
        marks = (share(last["both"]), share(coders[f]["both"]), f"{last['kid'][0]:.4f}")
        yield (f, denoiser["seed"], space, last["step"], f"{spent:,.0f} s", *marks)


trained = demonstration()
if trained is None:
    print("Nothing is trained yet: python -m experiments.pixels.train")
else:
    seeds = trained["seeds"]
    print(
        f"{trained['title']}, {'one seed' if len(seeds) == 1 else f'{len(seeds)} seeds'}: {seeds}"
    )
    heads = ["f", "seed", "on", "steps", "trained for", "recognised", "ceiling", "KID"]
    print(table(heads, trained_rows(trained)))
    if left := [run["grid"] for run in trained["runs"] if run["f"] == published_model.f]:
        print(f"f = {published_model.f} leaves {left[0]} x {left[0]} latents of these pictures,")
        print(f"and {WIDEST} x {WIDEST} of those of Stable Diffusion: there it has more room.")

# %% [markdown]
# That is all of it. A sentence became vectors. Noise became latents, a little at a time, while
# every place asked the words what to be. A decoder painted the latents. Where to go from here:
#
# * `probe show latest --runs runs/deep_dive` tells what else is in the recording of section four;
# * `experiments/astronaut.yaml` is an experiment to change, and to run with
#   `python -m probe.run experiments/astronaut.yaml`;
# * with a GPU, `experiments/astronaut-sd14.yaml` does the same with Stable Diffusion itself.

# %%
if options.html:  # from the command line alone
    from experiments.lesson_pages import write_pages

    same = {key: experiment[key] for key in ("seed", "dtype", "device")}
    beside = {"output": str(OUT / "noising"), "progress": False}
    noised = probe.record_noising(np.asarray(one_line), PROMPT, **same, **beside)
    for path in write_pages(options.html, Path(__file__), noised, run):
        print(f"  -> {path}")
print(f"{len(list(OUT.glob('?-*.png')))} pictures and the recording {run.name} are in {OUT}.")
