"""`clipindex bench` as a committed result: every stage, and all together, beside what bounds each."""

import json
import sys

from commands import run_command
from reporting import Row, arguments, finish

MODELS = ("ViT-B-32", "RN50")
LIMIT_S = 3600.0


def main() -> None:
    """Measure, print and, with --save, keep."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--precisions", nargs="+", default=["auto", "fp32"])
    parser.add_argument("--images", type=int)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    # The command itself, since what it does to its process is a part of its speed.
    command = [sys.executable, "-m", "clipindex", "bench", "--json", "--device", options.device]
    command += ["--models", ",".join(options.models), "--precisions", ",".join(options.precisions)]
    command += ["--images", str(options.images)] if options.images else []
    rows: list[Row] = [
        {
            "stage": row["stage"],
            "setting": row["setting"],
            "images_per_s": round(row["images_per_s"], 1),
            "ceiling_per_s": round(row["ceiling_per_s"], 1),
            "ratio": round(row["of_ceiling"], 2),
            "ceiling is": row["ceiling"],
        }
        for row in json.loads(run_command(command, LIMIT_S).said)["measurements"]
    ]
    finish("bench", rows, options.save)


if __name__ == "__main__":
    main()
