"""Train the small CLIP that the package ships, on digits and rendered scenes.

python jobs/demo_model.py [--out clipindex/demo_data/model] [--steps 3000] [--seed 0]

About ten minutes on two cores. Whole colour-shape pairs never appear in training, neither as image nor as text; that
the model names them all the same is what the demo shows. Four things make it so. The text tower has no position
embedding and one layer, so that a prompt is nearly the sum of its words. Half of the scenes have colours without a
name, so that shapes are learnt apart from colours. An image is matched with its pair, its colour and its shape alike.
And of held-out pairs the loss says nothing, neither that an image is one nor that it is none.

The loss is CLIP's symmetric cross-entropy (arXiv:2103.00020) with several positives a row (arXiv:2004.11362).
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from demo_assets import DIGIT_NAMES, DIGIT_TEMPLATES, OUT, SCENE_TEMPLATES, digits
from demo_scenes import CLASS_NAMES, COLOURS, COMBINATIONS, HELD_OUT, SHAPES, TRAINING, render_scene
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

log = logging.getLogger(__name__)

IMAGE_SIZE = 64
NUM_SCENES = 16_000
SCENES_A_BATCH, DIGITS_A_BATCH = 80, 48
LEARNING_RATE = 3e-3
WORD_DROP = 0.15
"""Share of filler words that are replaced, so that prompts of other words do little harm."""
MODEL_CFG = {
    "embed_dim": 64,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "patch_size": None, "image_size": IMAGE_SIZE},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS_CFG = {
    "size": IMAGE_SIZE, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
    "resize_mode": "shortest", "fill_color": 0,
}  # fmt: skip
PAIR_PROMPTS = [*SCENE_TEMPLATES, "{c}", "the {c}", "a picture of a {c}", "a rendering of the {c}", "there is a {c}",
                "a {c} on a plain background", "a small {c}", "a large {c}", "an icon of a {c}",
                "this is a {c}"]  # fmt: skip
COLOUR_PROMPTS = ["{c}", "something {c}", "a {c} thing", "a {c} object", "a {c} shape", "a photo of something {c}",
                  "the colour {c}", "it is {c}", "a small {c} object", "a large {c} shape"]  # fmt: skip
DIGIT_PROMPTS = [*DIGIT_TEMPLATES, "{c}", "a {c}", "the digit {c}", "a photo of the number {c}",
                 "a scan of a handwritten {c}", "this is the number {c}"]  # fmt: skip

_UNNAMED = 100
"""Scene labels from here on are shapes in a colour without a name."""


class Concepts:
    """What texts can mean: 80 pairs, 10 colours, 10 shapes, 10 digits; each with its prompts, tokenised."""

    def __init__(self) -> None:
        groups = [
            ([CLASS_NAMES[label] for label in TRAINING], PAIR_PROMPTS),
            (list(COLOURS), COLOUR_PROMPTS),
            (list(SHAPES), PAIR_PROMPTS),
            (DIGIT_NAMES, DIGIT_PROMPTS),
        ]
        named = [(name, prompts) for names, prompts in groups for name in names]
        tokenizer = open_clip.SimpleTokenizer(context_length=MODEL_CFG["text_cfg"]["context_length"])  # type: ignore[index]
        self.size = len(named)
        self._counts = torch.tensor([len(prompts) for _, prompts in named])
        self._firsts = torch.cumsum(self._counts, 0) - self._counts
        self._tokens = tokenizer([prompt.format(c=name) for name, prompts in named for prompt in prompts])
        telling = {token for name, _ in named for token in tokenizer.encode(name)}
        self._telling = torch.tensor([0, tokenizer.sot_token_id, tokenizer.eot_token_id, *sorted(telling)])
        self._filler = tokenizer.encode("unknown")[0]

    def sample(self) -> torch.Tensor:
        """A random prompt for each concept, int64 [concepts, context], with some filler words replaced."""
        tokens = self._tokens[self._firsts + (torch.rand(self.size) * self._counts).long()]
        drop = (torch.rand(tokens.shape) < WORD_DROP) & ~torch.isin(tokens, self._telling)
        return torch.where(drop, self._filler, tokens)


def positives(scene_labels: torch.Tensor, digit_labels: torch.Tensor) -> torch.Tensor:
    """Which concepts are true of which image, bool [scenes + digits, concepts]."""
    truth = torch.zeros(len(scene_labels) + len(digit_labels), 110, dtype=torch.bool)
    pair_of = {label: at for at, label in enumerate(TRAINING)}
    for row, label in enumerate(scene_labels.tolist()):
        if label < _UNNAMED:
            truth[row, [pair_of[label], 80 + label // 10, 90 + label % 10]] = True
        else:
            truth[row, 90 + label - _UNNAMED] = True
    truth[torch.arange(len(scene_labels), len(truth)), 100 + digit_labels] = True
    return truth


def unsaid(scene_labels: torch.Tensor, num_digits: int) -> torch.Tensor:
    """Which concepts are no negatives of which image, bool [scenes + digits, concepts].

    Red circles are held out, so no red thing that training shows is a circle. To say so of every one of them would
    teach that red things are not circles. Where a text's shape and an image's colour make a held-out pair, or the
    other way round, the loss says nothing.
    """
    held_out = torch.zeros(11, 11, dtype=torch.bool)  # the last row and column: no colour, no shape
    for label in HELD_OUT:
        held_out[label // 10, label % 10] = True
    colours = torch.full((110,), 10)
    shapes = torch.full((110,), 10)
    colours[:80], shapes[:80] = torch.tensor(TRAINING) // 10, torch.tensor(TRAINING) % 10
    colours[80:90] = shapes[90:100] = torch.arange(10)
    scene_colours = torch.where(scene_labels < _UNNAMED, scene_labels // 10, 10)
    scene_shapes = torch.where(scene_labels < _UNNAMED, scene_labels % 10, scene_labels - _UNNAMED)
    scenes = held_out[scene_colours[:, None], shapes[None]] | held_out[colours[None], scene_shapes[:, None]]
    return torch.cat([scenes, torch.zeros(num_digits, 110, dtype=torch.bool)])


def contrast(logits: torch.Tensor, truth: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each positive against the negatives of its row, averaged; all arguments [rows, columns]."""
    negatives = logits.masked_fill(truth | left_out, -math.inf).logsumexp(dim=1, keepdim=True)
    return functional.softplus(negatives - logits)[truth].mean()


def render_training_scenes(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes of the training pairs and of unnamed colours by turns: uint8 [N, 3, H, W] and labels [N]."""
    rng = np.random.default_rng(seed)
    labels = [TRAINING[at // 2 % 80] if at % 2 else _UNNAMED + at // 2 % 10 for at in range(NUM_SCENES)]
    scenes = [
        render_scene(*COMBINATIONS[label], rng)
        if label < _UNNAMED
        else render_scene(None, list(SHAPES)[label - _UNNAMED], rng)
        for label in labels
    ]
    return as_pixels(scenes), torch.tensor(labels)


def as_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Images as the model's preprocessing sees them, before normalising: uint8 [N, 3, H, W]."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    stack = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(stack)).permute(0, 3, 1, 2).contiguous()


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in -1 to 1, float32."""
    return pixels.float() / 127.5 - 1


def turned(scenes: torch.Tensor) -> torch.Tensor:
    """Scenes after a random quarter turn or mirror image: no label here depends on it."""
    choice = int(torch.randint(8, ()))
    scenes = torch.rot90(scenes, choice % 4, (2, 3))
    return scenes.flip(3) if choice > 3 else scenes


def written_anew(images: torch.Tensor) -> torch.Tensor:
    """Digits after a slight random slant, turn, zoom, shift, fade, inversion and noise."""
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty(n, *shape).uniform_(low, high)

    angle, zoom, slant = uniform(-0.26, 0.26), uniform(0.85, 1.2, 2), uniform(-0.2, 0.2)
    grid = torch.zeros(n, 2, 3)
    grid[:, 0, 0], grid[:, 0, 1] = angle.cos() * zoom[:, 0], -angle.sin() * zoom[:, 1] + slant
    grid[:, 1, 0], grid[:, 1, 1] = angle.sin() * zoom[:, 0], angle.cos() * zoom[:, 1]
    grid[:, :, 2] = uniform(-0.15, 0.15, 2)
    flow = functional.affine_grid(grid, list(images.shape), align_corners=False)
    images = functional.grid_sample(images, flow, align_corners=False, padding_mode="border")
    images = images * uniform(0.6, 1, 1, 1, 1) * torch.where(torch.rand(n, 1, 1, 1) < 0.2, -1.0, 1.0)
    return images + torch.randn_like(images) * uniform(0, 0.15, 1, 1, 1)


def train(model: CLIP, steps: int, seed: int) -> None:
    """Fit a model in place."""
    concepts = Concepts()
    scenes, scene_labels = render_training_scenes(seed)
    images, labels, held_out = digits()
    digit_pixels = as_pixels([Image.fromarray(image) for image in images[~held_out]])
    digit_labels = torch.from_numpy(labels[~held_out])
    optimizer = torch.optim.AdamW(_parameter_groups(model), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    started, total = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        some = torch.randint(len(scenes), (SCENES_A_BATCH,))
        few = torch.randint(len(digit_pixels), (DIGITS_A_BATCH,))
        batch = torch.cat([turned(normalised(scenes[some])), written_anew(normalised(digit_pixels[few]))])
        truth = positives(scene_labels[some], digit_labels[few])
        text = model.encode_text(concepts.sample(), normalize=True)
        logits = model.logit_scale.exp() * model.encode_image(batch, normalize=True) @ text.T
        left_out = unsaid(scene_labels[some], DIGITS_A_BATCH)
        loss = (contrast(logits, truth, left_out) + contrast(logits.T, truth.T, left_out.T)) / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        total += float(loss.detach())
        if step % 100 == 0:
            log.info("step %d of %d: loss %.3f, %.0f s", step, steps, total / 100, time.monotonic() - started)
            total = 0.0


def _parameter_groups(model: CLIP) -> list[dict[str, object]]:
    table = model.token_embedding.weight
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1 and p is not table]
    others = [p for p in model.parameters() if p.requires_grad and (p.ndim <= 1 or p is table)]
    return [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]


def new_model(seed: int) -> CLIP:
    """A model of `MODEL_CFG` with random weights, word vectors that start at nothing, and no position embedding."""
    torch.manual_seed(seed)
    model = CLIP(**MODEL_CFG)
    model.positional_embedding.requires_grad_(False).zero_()
    return model


@torch.no_grad()
def forget_unseen_words(model: CLIP) -> None:
    """Give words that training never met the vector of the filler, which it learnt to pass over."""
    concepts = Concepts()
    seen = torch.zeros(len(model.token_embedding.weight), dtype=torch.bool)
    seen[concepts._tokens.unique()] = True
    filler = model.token_embedding.weight[concepts._filler].clone()
    model.token_embedding.weight[~seen] = filler


@torch.inference_mode()
def accuracy(
    model: CLIP, pixels: torch.Tensor, labels: Sequence[int], names: Sequence[str], prompts: Sequence[str]
) -> float:
    """Zero-shot accuracy among `names`, 0 to 1."""
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    classes = [
        model.encode_text(tokenizer([p.format(c=name) for p in prompts]), normalize=True).mean(0) for name in names
    ]
    vectors = functional.normalize(torch.stack(classes), dim=-1)
    predicted = (model.encode_image(normalised(pixels), normalize=True) @ vectors.T).argmax(dim=1)
    return float((predicted == torch.tensor(labels)).float().mean())


def measure(model: CLIP) -> dict[str, float]:
    """Accuracy on held-out digits, on pairs never seen, and on new scenes of pairs that were."""
    model.eval()
    rng = np.random.default_rng(2_000_003)
    images, labels, held_out = digits()
    found = {
        "held-out digits, among 10": accuracy(
            model,
            as_pixels([Image.fromarray(image) for image in images[held_out]]),
            labels[held_out].tolist(),
            DIGIT_NAMES,
            DIGIT_TEMPLATES,
        )
    }
    for what, chosen in (("unseen pairs, among 100", HELD_OUT * 25), ("seen pairs, among 100", TRAINING * 6)):
        scenes = as_pixels([render_scene(*COMBINATIONS[label], rng) for label in chosen])
        found[what] = accuracy(model, scenes, chosen, CLASS_NAMES, SCENE_TEMPLATES)
    return found


def save(model: CLIP, folder: Path) -> None:
    """Write an open_clip `local-dir:` folder, weights in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: t.half() if t.is_floating_point() and t.ndim else t for name, t in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")


def main() -> None:
    """Train, measure, save."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT / "model")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = new_model(options.seed)
    train(model, options.steps, options.seed)
    forget_unseen_words(model)
    for what, share in measure(model).items():
        log.info("%s: %.2f %%", what, 100 * share)
    save(model, options.out)


if __name__ == "__main__":
    main()
