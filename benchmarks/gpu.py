"""Everything worth knowing of one GPU, in one command of less than ten minutes: is it right, then how fast is it.

Right: pixels that the GPU decoded beside the CPU's (`device_decode.py`), and cosines of each precision's embeddings to
those of fp32 on the CPU. Fast: decoding both ways; then every stage beside its ceiling, for each model, until the time
is up. Expected of bf16 on a data-centre GPU: small models are bound by decoding, ViT-L/14 and larger by the GPU at half
of its bare matrix product.
"""

import time

import device_decode
from precision import compare
from reporting import Row, arguments, finish

from clipindex.bench.run import bench
from clipindex.devices import choose_devices
from clipindex.models import load_model
from clipindex.types import ModelSpec

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
LIMIT_S = 480.0
DECODE_IMAGES = 8192


def main() -> None:
    """Measure, print and, with --save, keep."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int)
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="begin no model after this")
    options = parser.parse_args()
    started = time.perf_counter()
    chosen = choose_devices(options.device)[0]
    device = str(chosen)
    small = load_model(ModelSpec(name=device_decode.MODEL, random_init=0))
    finish("gpu_decode_precision", device_decode.compare(small, chosen), options.save)
    finish("gpu_decode_speed", device_decode.rates(small, chosen, options.images or DECODE_IMAGES), options.save)
    right: list[Row] = []
    fast: list[Row] = []
    for name in options.models:
        if time.perf_counter() - started > options.limit_s:
            print(f"{name}: left out, the time is up")
            continue
        right += compare(name, load_model(ModelSpec(name=name, random_init=0)), device)
        report = bench([name], images=options.images, device=device)
        fast += [
            {
                "stage": row.stage,
                "setting": row.setting,
                "images_per_s": round(row.images_per_s, 1),
                "ceiling_per_s": round(row.ceiling_per_s, 1),
                "ratio": round(row.of_ceiling, 3),
                "note": row.note or row.ceiling,
            }
            for row in report.measurements
        ]
    finish("gpu_precision", right, options.save)
    finish("gpu_speed", fast, options.save)


if __name__ == "__main__":
    main()
